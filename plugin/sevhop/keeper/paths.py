"""What is where in a keeper's directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..libvirt import hook_server


@dataclass(frozen=True)
class KeeperPaths:
    """
    The files in the directory of one keeper.

    :ivar directory: the keeper makes and removes it.
    """

    directory: Path

    @property
    def control(self) -> Path:
        """The socket for the command."""
        return self.directory / "control"

    @property
    def hook(self) -> Path:
        """The socket for the hook."""
        return self.directory / hook_server.SOCKET

    @property
    def keeper(self) -> Path:
        """The socket for adopt.so."""
        return self.directory / "keeper"

    @property
    def monitor(self) -> Path:
        """Where the destination opens a monitor for the keeper. QEMU's user may create anything beside it."""
        return self.directory / "monitor" / "qmp"

    @property
    def image(self) -> Path:
        """The save image: the guest's device state."""
        return self.directory / "image"
