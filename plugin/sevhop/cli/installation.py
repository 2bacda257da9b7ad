"""``sevhop install`` and ``sevhop uninstall``: what they call, and what they print."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence

from .. import api
from .exit_codes import EXIT_DONE
from .output import complain, say


def install(options: argparse.Namespace) -> int:
    """The command. :return: its exit status."""
    api.expect_libvirt()
    return _administered(options, _verified() if options.verify else _installed())


def _installed() -> str:
    from ..install import host

    paths = host.install()
    return f"installed {', '.join(map(str, paths))}; {_verified()}"


def _verified() -> str:
    from ..install import verification
    from ..libvirt.connection import Connection

    async def verify() -> None:
        connection = await Connection.open()
        try:
            await verification.verify_hook(connection, verification.ATTEMPTS)
            await verification.verify_library(connection)
        finally:
            connection.close()

    asyncio.run(verify())
    return "libvirt calls the hook"


def uninstall(options: argparse.Namespace) -> int:
    """The command. :return: its exit status."""
    api.expect_libvirt()
    from ..engine import way_back
    from ..guest import kept_emulator
    from ..install import host
    from ..libvirt.daemon import DEFAULT_URI
    from ..records import reboot_mark

    rebooting = reboot_mark.names()
    done = "removed" if host.uninstall() else "it was not installed"
    notes = []
    if kept_emulator.directories():
        asyncio.run(way_back.forget_unused_at(DEFAULT_URI))
    if kept_emulator.directories():
        notes.append(f"{kept_emulator.DIRECTORY} stays: guests that were rolled back run from it, or are saved")
    if rebooting:
        notes.append(
            f"the next reboot of {', '.join(rebooting)} is a shutdown, and the hook does not start them again any"
            " more; then run: virsh start"
        )
    return _administered(options, done, notes)


def _administered(options: argparse.Namespace, done: str, notes: Sequence[str] = ()) -> int:
    """Print what was changed on the host."""
    if options.json:
        print(json.dumps({"outcome": "done", "detail": done, "notes": list(notes)}))
    else:
        for note in notes:
            complain(f"note: {note}")
        say(done)
    return EXIT_DONE
