"""The command on a terminal: what is drawn, and that nothing is drawn while the guest is stopped."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
from pathlib import Path

from tests.support.guests.running import Guest

from .conftest import DescribeCounter, StartGuest
from .hops import STOP, STREAM_END

_ERASE_LINE = "\x1b[2K"
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def run_on_terminal(*command: str | Path, cwd: Path) -> tuple[int, str]:
    """Run a command on a terminal. :return: its exit status and its output."""
    ours, theirs = os.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "500", "LINES": "50"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=cwd)
    os.close(theirs)
    written = b""
    try:
        while select.select([ours], [], [], 120)[0]:
            written += os.read(ours, 1 << 16)
    except OSError:
        pass  # the other end is closed
    finally:
        os.close(ours)
    return process.wait(10), written.decode()


def final_lines(written: str) -> list[str]:
    """The lines, without what was erased again."""
    lines = [line.rpartition(_ERASE_LINE)[2] for line in written.replace("\r", "").split("\n")]
    return [_ESCAPE.sub("", line) for line in lines]


def hop(guest: Guest, new: Path) -> list[str | Path]:
    """The command."""
    return [sys.executable, "-m", "sevhop.cli", "hop", "--qmp", guest.machine.monitor, "--emulator", new]


def test_progress_is_drawn_outside_the_downtime(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest, tmp_path: Path
) -> None:
    guest = start(counter_machine(), old)
    guest.wait_for_ticks(5)
    # All of its threads, and none of what it starts.
    trace = ["strace", "--follow-forks", "--detach-on=execve", "--output", str(tmp_path / "calls")]
    status, written = run_on_terminal(*trace, *hop(guest, new), cwd=tmp_path)
    assert status == 0
    assert "check ..." in written
    assert re.search(r"prepare \d+ ms  ", written)
    summary, bar, legend = [line for line in final_lines(written) if line.strip()]
    assert re.search(r"QEMU 7\.2\.\d+ -> 10\.0\.\d+, now process \d+; downtime \d+(\.\d)? ms", summary)
    assert 50 < len(bar.strip()) < 70
    assert re.search(r"stop .* ms .* save .* ms .* load .* ms .* resume .* ms", legend)

    lines = (tmp_path / "calls").read_text(errors="replace").splitlines()
    (stop,), (end,) = ([at for at, line in enumerate(lines) if what in line] for what in (STOP, STREAM_END))
    drawing = [at for at, line in enumerate(lines) if re.match(r"\d+ +write\([12],", line)]
    assert drawing
    assert [lines[at] for at in drawing if stop < at < end] == []
    guest.wait_for_ticks(5)


def test_progress_is_not_drawn_without_a_terminal(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    guest = start(counter_machine(), old)
    guest.wait_for_ticks(5)
    done = subprocess.run(hop(guest, new), capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1


def test_phases_are_plain_lines_without_rich(tmp_path: Path) -> None:
    (tmp_path / "rich").write_text("")
    program = "import sys; sys.modules['rich'] = None\nfrom sevhop.cli.main import main; sys.exit(main(sys.argv[1:]))"
    status, written = run_on_terminal(sys.executable, "-c", program, "hop", "--qmp", "/nonexistent", cwd=tmp_path)
    assert status == 1
    phase, complaint = written.splitlines()
    assert re.fullmatch(r"/nonexistent: check \d+(\.\d)? ms", phase)
    assert complaint.startswith("sevhop: /nonexistent: ")
