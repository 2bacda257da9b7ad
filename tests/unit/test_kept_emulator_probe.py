"""A program that is kept for a rollback, and hangs when it is asked for its firmware."""

from __future__ import annotations

from pathlib import Path

import pytest
from sevhop.guest import emulator, kept_emulator
from sevhop_qmp.errors import SevhopError


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return tmp_path / "qemu"


def test_hung_program_is_reported_without_its_command(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(emulator, "PATIENCE", 0.2)
    with pytest.raises(SevhopError) as caught:
        kept_emulator._firmware(program, program.parent)
    assert caught.value.message == "its program does not answer within 0.2 s"


def test_program_that_cannot_be_started_is_reported_without_pythons_notation(program: Path) -> None:
    program.write_text("")
    program.chmod(0o644)
    with pytest.raises(SevhopError) as caught:
        kept_emulator._firmware(program, program.parent)
    assert caught.value.message == "its program does not start any more: Permission denied"
