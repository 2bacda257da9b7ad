"""The ways that the benchmark compares: each arrives, and its pause is seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from bench.bare import MODES, Bare
from guests import emulators
from guests.machine import Accelerator


@pytest.mark.parametrize("mode", MODES)
def test_guest_arrives(mode: str, emulator: Callable[[str], Path], accelerator: Accelerator, tmp_path: Path) -> None:
    bare = Bare(emulator(emulators.NEW), accelerator, tmp_path, tmp_path)
    run = bare.run(mode, "minimal", 32)
    assert run.pause_ms > 0
    assert run.source == run.destination
    assert run.source.startswith("10.")
    assert (mode in ("hop", "file")) == bool(run.phases)
    assert list(tmp_path.iterdir()) == []
