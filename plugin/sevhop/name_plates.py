"""
The paths under which a guest is known: its sockets and its pid file. When a hop is over they lead to the destination.

The destination listens at the very sockets of the source, but the source, when it ends, removes their paths. So each
gets a second name before that, which is renamed afterwards. The destination writes its pid file under another name,
which takes the place of the source's.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from sevhop_qmp.process import Address


@dataclass(frozen=True)
class NamePlates:
    """
    Paths, all absolute.

    :ivar sockets: (path, second name) of each socket.
    :ivar pidfile: (path that the destination writes, path it must have in the end), if there is one.
    """

    sockets: list[tuple[str, str]]
    pidfile: tuple[str, str] | None = None

    @classmethod
    def of(cls, working_directory: str, listeners: Iterable[Address], pidfile: tuple[str, str] | None) -> Self:
        """
        The name plates of a guest.

        :param working_directory: of source and destination.
        :param listeners: where the source listens.
        """
        sockets = []
        for address in listeners:
            name = address[1]
            if address[0] == socket.AF_UNIX and not name.startswith("\0"):
                path = Path(working_directory, name)
                sockets.append((str(path), str(path.with_name(f".{path.name[:16]}.{secrets.token_hex(8)}"))))
        if pidfile is not None:
            pidfile = (os.path.join(working_directory, pidfile[0]), os.path.join(working_directory, pidfile[1]))
        return cls(sockets, pidfile)

    def as_facts(self) -> dict[str, Any]:
        """For the journal."""
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Self:
        """
        Back again.

        :raises ValueError, TypeError, KeyError: these are none.
        """
        sockets = [(str(path), str(spare)) for path, spare in facts["sockets"]]
        pidfile = facts["pidfile"]
        return cls(sockets, pidfile and (str(pidfile[0]), str(pidfile[1])))

    def keep(self) -> None:
        """Before the source ends: second names for its sockets."""
        for path, spare in self.sockets:
            with contextlib.suppress(OSError):
                os.link(path, spare, follow_symlinks=False)

    def hand_over(self) -> None:
        """When it has ended: its names are the destination's."""
        for path, spare in self.sockets:
            with contextlib.suppress(OSError):
                if os.path.lexists(path):
                    os.unlink(spare)
                else:
                    os.rename(spare, path)
        if self.pidfile is not None:
            with contextlib.suppress(OSError):
                os.replace(*self.pidfile)

    def take_back(self) -> None:
        """The source stays: what was made for the destination goes away."""
        made = [spare for _, spare in self.sockets] + ([self.pidfile[0]] if self.pidfile else [])
        for path in made:
            with contextlib.suppress(OSError):
                os.unlink(path)
