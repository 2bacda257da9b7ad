"""What a shell offers when the name of a domain is to be typed: the domains that run, whatever they are called."""

from __future__ import annotations

import os
import pty
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.guests.daemon import Daemon, DomainGuest
from tests.support.guests.release import Release

_PATIENCE = 30.0
#: As each shell quotes it.
_QUOTED = r"guest-\$\(touch\ pwned\)\;a\ b\*"
_SET_UP = {
    "bash": (
        ("bash", "--norc", "--noprofile", "-i"),
        "PS1='here''> '; bind 'set enable-bracketed-paste off'; . /usr/share/bash-completion/bash_completion",
    ),
    "zsh": (
        ("zsh", "-f", "-i"),
        "PS1='here''> '; unset zle_bracketed_paste; autoload -U compinit; compinit -u -D",
    ),
}


class Terminal:
    """A terminal with a shell."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._shown = ""

    def type(self, text: str) -> None:
        """Type; a tab is the key."""
        os.write(self._fd, text.encode())

    def wait_for(self, text: str) -> None:
        """Until that is shown, behind what was waited for before."""
        end = time.monotonic() + _PATIENCE
        while text not in self._shown:
            ready, _, _ = select.select([self._fd], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"shown: {self._shown!r}"
            self._shown += os.read(self._fd, 4096).decode(errors="replace")
        self._shown = self._shown.partition(text)[2]


@contextmanager
def shell(daemon: Daemon, name: str) -> Iterator[Terminal]:
    """An interactive shell."""
    ours, theirs = pty.openpty()
    command, set_up = _SET_UP[name]
    process = daemon.start_command("env", "TERM=xterm", "COLUMNS=200", *command, terminal=theirs)
    os.close(theirs)
    terminal = Terminal(ours)
    try:
        terminal.type(f"{set_up}\n")
        terminal.wait_for("here> ")
        yield terminal
    finally:
        os.close(ours)
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", sorted(_SET_UP))
def test_shell_completes_a_domain(daemon: Daemon, guest: DomainGuest, host: Release, name: str) -> None:
    with shell(daemon, name) as terminal:
        terminal.type("sevhop upgrade --dry-run gu\t")
        terminal.wait_for(_QUOTED)
        terminal.type("\n")
        terminal.wait_for(f"{guest.name}: ")
        terminal.wait_for("here> ")
        terminal.type("sevhop unin\t")
        terminal.wait_for("uninstall")
    assert host.must("find", "/", "-xdev", "-name", "pwned") == ""


def test_fish_completes_a_domain(daemon: Daemon, guest: DomainGuest, host: Release) -> None:
    offered = daemon.run("fish", "--command", "complete --do-complete 'sevhop upgrade gu'").stdout
    assert [line.partition("\t")[0] for line in offered.splitlines()] == [guest.name]
    assert "--keep-going" in daemon.run("fish", "--command", "complete --do-complete 'sevhop upgrade --'").stdout
    assert host.must("find", "/", "-xdev", "-name", "pwned") == ""


def test_completion_offers_nothing_without_libvirt(host: Release) -> None:
    done = host.run("fish", "--command", "complete --do-complete 'sevhop upgrade gu'")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
