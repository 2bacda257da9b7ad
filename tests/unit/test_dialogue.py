"""Programs that are started for some questions: they may be any program, and may outlive the command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from sevhop.guest import emulator
from sevhop.process import dialogue
from sevhop_qmp.errors import SevhopError

PIPE = subprocess.PIPE


def program(*words: str, stdin: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(words, stdin=stdin, stdout=PIPE, stderr=PIPE)


def test_program_has_all_questions_before_it_exists() -> None:
    """And their end: nobody has to live for it to get them."""
    with dialogue.questions(b"one\ntwo\n") as stdin:
        child = program("cat", stdin=stdin)
    with child:
        assert dialogue.answers(child, 10) == (b"one\ntwo\n", b"")


def test_questions_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(OSError, match="too long"), dialogue.questions(bytes(1 << 20)):
        pytest.fail("it would have waited for a reader")


def test_both_outputs_are_read_until_the_program_ends() -> None:
    text = "x" * 200_000
    script = f"import sys; text = 'x' * {len(text)}; sys.stderr.write(text); sys.stdout.write(text)"
    with dialogue.questions(b"") as stdin, program(sys.executable, "-c", script, stdin=stdin) as child:
        assert dialogue.answers(child, 10) == (text.encode(), text.encode())


@pytest.mark.parametrize("closes", ["", "exec >&- 2>&-; "], ids=["silent", "without output"])
def test_program_that_does_not_end_is_not_waited_for(closes: str) -> None:
    with dialogue.questions(b"") as stdin, program("sh", "-c", f"{closes}exec sleep 60", stdin=stdin) as child:
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                dialogue.answers(child, 0.1)
        finally:
            child.kill()


@pytest.mark.parametrize("number", [1, 2], ids=["output", "errors"])
def test_program_that_prints_without_end_is_no_emulator(number: int, tmp_path: Path) -> None:
    """Its output would fill the memory of the host."""
    endless = tmp_path / "endless"
    endless.write_text(f"#!/bin/sh\nexec yes >&{number}\n")
    endless.chmod(0o755)
    with pytest.raises(SevhopError, match=r"endless is not a QEMU system emulator: it prints more than 16 MiB"):
        emulator.query(str(endless), emulator.COMMANDS)
