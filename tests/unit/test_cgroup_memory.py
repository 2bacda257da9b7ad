"""A cgroup that has too little memory for a second QEMU, by what the kernel reports."""

from __future__ import annotations

from pathlib import Path

import pytest
from sevhop.process import cgroup_memory
from sevhop.process.cgroup_memory import MOST, shortage

MIB = 1 << 20


@pytest.fixture
def hierarchy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cgroup_memory, "cgroup_directory", lambda _, path: tmp_path / path.lstrip("/"))
    return tmp_path


def group(path: Path, limit: str, used: int, cache: int, version: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }
    most, usage, file = names[version]
    (path / most).write_text(f"{limit}\n")
    (path / usage).write_text(f"{used}\n")
    (path / "memory.stat").write_text(f"anon 5\n{file} {cache}\n")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("limit", "cache", "full"),
    [(120 * MIB, 0, False), (110 * MIB, 0, True), (110 * MIB, 12 * MIB, False), (90 * MIB, 0, True)],
)
def test_available_memory_is_the_limit_less_unreclaimable_usage(
    version: int, limit: int, cache: int, full: bool, hierarchy: Path
) -> None:
    group(hierarchy / "vm", str(limit), 100 * MIB, cache, version)
    reason = shortage([("cpu", "/vm"), ("memory" if version == 1 else "", "/vm")], 20 * MIB)
    assert bool(reason) == full
    assert not full or reason.startswith(f"{hierarchy}/vm has room for ")


def test_limit_of_a_parent_cgroup_applies(hierarchy: Path) -> None:
    group(hierarchy / "vms", str(105 * MIB), 100 * MIB, 0, 2)
    group(hierarchy / "vms/one", "max", 50 * MIB, 0, 2)
    assert shortage([("", "/vms/one")], 20 * MIB).startswith(f"{hierarchy}/vms has room for 5 MiB")


def test_source_that_has_grown_does_not_increase_the_need(hierarchy: Path) -> None:
    group(hierarchy / "vm", str(100 * MIB + MOST), 100 * MIB, 0, 2)
    assert not shortage([("", "/vm")], 1 << 40)


def test_hierarchy_without_the_memory_controller_is_skipped(hierarchy: Path) -> None:
    (hierarchy / "vm").mkdir()
    assert not shortage([("", "/vm"), ("name=systemd", "/vm")], 20 * MIB)
