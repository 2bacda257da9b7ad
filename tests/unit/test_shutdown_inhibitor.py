"""The host does not shut down during a hop; systemd-inhibit is simulated, as there may be no systemd."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sevhop.process import shutdown_inhibitor, systemd
from sevhop.process.shutdown_inhibitor import taken

from tests.support.guests.running import wait_until

#: As the program is used: options, and a command that is run as long as the inhibitor is there.
PROGRAM = """#!/bin/sh
for word; do case $word in --*) shift; echo "$word" >>{said};; esac; done
echo $$ >>{said}
exec "$@"
"""


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the program was called with, and its process."""
    program = tmp_path / "systemd-inhibit"
    program.write_text(PROGRAM.format(said=tmp_path / "said"))
    program.chmod(0o755)
    monkeypatch.setattr(systemd, "BOOTED", tmp_path)
    monkeypatch.setattr(shutdown_inhibitor, "_PROGRAM", program)
    return tmp_path / "said"


def lines(said: Path) -> list[str]:
    wait_until(lambda: said.exists() and said.read_text().count("\n") == 5, 10, "the program runs")
    return said.read_text().split()


def test_inhibitor_is_taken_meanwhile(said: Path) -> None:
    with taken("a_hop"):
        *options, pid = lines(said)
        assert options == ["--what=shutdown:sleep", "--mode=block", "--who=sevhop", "--why=a_hop"]
        os.kill(int(pid), 0)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_inhibitor_ends_with_a_process_that_is_killed(said: Path) -> None:
    program = f"""
import os, pathlib, signal
from sevhop.process import systemd, shutdown_inhibitor as inhibitor
systemd.BOOTED = pathlib.Path({str(said.parent)!r})
inhibitor._PROGRAM = systemd.BOOTED / "systemd-inhibit"
with inhibitor.taken("a_hop"):
    print(flush=True)
    signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        pid = lines(said)[-1]
        process.kill()
    wait_until(lambda: not Path(f"/proc/{pid}/exe").exists(), 10, "it has exited")


def test_hop_goes_on_without(said: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    (said.parent / "systemd-inhibit").write_text("#!/bin/sh\nexit 1\n")
    with taken("a hop"):
        pass
    assert "has exited with status 1" in caplog.text
    monkeypatch.setattr(shutdown_inhibitor, "_PROGRAM", said)
    with taken("a hop"):
        pass
    assert "No such file" in caplog.text
    monkeypatch.setattr(systemd, "BOOTED", said)
    with taken("a hop"):
        pass
