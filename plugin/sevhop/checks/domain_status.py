"""Where a domain stands: which QEMU runs it, is another one installed, can it hop, is a hop under way."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sevhop_qmp.process import OnDisk


@dataclass(frozen=True)
class Standing:
    """
    Where a domain stands.

    :ivar running: the version that runs it; empty when no QEMU does, or it cannot be asked.
    :ivar binary: what has become of the file that it was started from: ``unchanged``, ``replaced`` or ``deleted``.
    :ivar installed: the version that its emulator has on disk now; empty when there is none.
    :ivar hop: how far a hop of it has come; empty when none is under way.
    :ivar obstacle: why it cannot hop; empty when it can.
    """

    name: str
    running: str = ""
    binary: str = ""
    installed: str = ""
    hop: str = ""
    obstacle: str = ""

    @property
    def outdated(self) -> bool:
        """Whether a hop to the emulator on disk would change something."""
        if not self.running or not self.installed:
            return False
        return self.running != self.installed or self.binary != OnDisk.UNCHANGED.value

    def as_json(self) -> dict[str, object]:
        """For ``--json``."""
        return asdict(self) | {"outdated": self.outdated}

    def __str__(self) -> str:
        if not self.running:
            if self.hop and not self.obstacle:
                return f"{self.name}: in a hop: {self.hop}"
            line = f"{self.name}: {self.obstacle or 'no QEMU'}"
        else:
            replaced = "" if self.binary == OnDisk.UNCHANGED.value else f" ({self.binary} on disk)"
            current = self.installed and not self.outdated
            disk = "up to date" if current else f"{self.installed or 'none'} is installed"
            able = f"cannot hop: {self.obstacle}" if self.obstacle else "can hop"
            line = f"{self.name}: QEMU {self.running}{replaced}, {disk}, {able}"
        return line + (f"; hop: {self.hop}" if self.hop else "")
