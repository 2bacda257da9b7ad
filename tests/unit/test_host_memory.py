"""Memory for further QEMUs."""

from __future__ import annotations

from pathlib import Path

import pytest
from sevhop.process.host_memory import OF_AN_UPGRADE, has_room


@pytest.mark.parametrize(
    ("text", "upgrades"),
    [
        (f"MemFree: 1 kB\nMemAvailable: {2 * OF_AN_UPGRADE >> 10} kB\n", 2),
        ("MemAvailable: 100 kB\n", 0),
        ("MemFree: 100 kB\n", 99),
        ("MemAvailable:\n", 99),
    ],
)
def test_room_is_what_the_kernel_calls_available(tmp_path: Path, text: str, upgrades: int) -> None:
    file = tmp_path / "meminfo"
    file.write_text(text)
    assert has_room(upgrades, file)
    assert has_room(upgrades + 1, file) == (upgrades == 99)


def test_kernel_of_today_says_it() -> None:
    assert "MemAvailable:" in Path("/proc/meminfo").read_text()
    assert not has_room(1 << 40)
