"""Emulators that fail, and what is true of a guest whose upgrade was rolled back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.support.guests.daemon import Daemon, DomainGuest
from tests.support.guests.enclosure import PROGRAMS


def wrapper(daemon: Daemon, name: str, emulator: Path, text: str, directory: Path = PROGRAMS) -> Path:
    """A program that libvirt takes for an emulator: a shell script that executes one."""
    path = directory / name
    inside = daemon.root / str(path).lstrip("/")
    inside.write_text(f'#!/bin/sh\n{text}\nexec {emulator} "$@"\n')
    inside.chmod(0o755)
    return path


def assert_as_before(daemon: Daemon, guest: DomainGuest, old: Path) -> None:
    """The guest runs in the old emulator, and lost nothing."""
    assert guest.state == "running"
    assert guest.emulator() == guest.emulator("--inactive") == str(old)
    guest.wait_for_ticks()
    assert daemon.left_over() == []


#: A file that another hook may look at.
MARK = "/run/other-hook"


@contextlib.contextmanager
def another_hook(daemon: Daemon, script: str) -> Iterator[None]:
    """Another hook of the administrator's, after ours, and :data:`MARK`."""
    hook, file = daemon.root / "etc/libvirt/hooks/qemu.d/zz-other", daemon.root / MARK.lstrip("/")
    hook.write_text(f"#!/bin/sh\n{script}\n")
    hook.chmod(0o755)
    file.touch()
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        hook.unlink()


def other_hook_refuses(daemon: Daemon) -> contextlib.AbstractContextManager[None]:
    """Another hook of the administrator's refuses the next start, after ours has committed."""
    script = f'[ "$2/$3" = started/begin ] && rm {MARK} 2>/dev/null && exit 1\nexit 0'
    return another_hook(daemon, script)


def other_hook_hangs(daemon: Daemon) -> contextlib.AbstractContextManager[None]:
    """Another hook of the administrator's does not return from a start, until the end of the context."""
    script = f'[ "$2/$3" = started/begin ] || exit 0\nwhile [ -e {MARK} ]; do sleep 0.1; done'
    return another_hook(daemon, script)


#: A migration stream as sevhop writes it has a configuration section, which this QEMU does not expect.
CANNOT_LOAD = 'case "$*" in *-incoming*) set -- "$@" -global migration.send-configuration=off;; esac'
DYING = {
    "dies at once": 'case "$*" in *-incoming*) echo "qemu: no, thanks" >&2; exit 1;; esac',
    "is killed": 'case "$*" in *-incoming*) kill -9 $$;; esac',
    "starts without the library": 'case "$*" in *-incoming*) unset LD_PRELOAD;; esac',
    "starts without the keeper": "unset SEVHOP_KEEPER",
}
