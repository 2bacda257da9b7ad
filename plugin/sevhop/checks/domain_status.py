"""The status of a domain: which QEMU runs it, which one is installed, can it hop, is a hop in progress."""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass

from sevhop_qmp.process import OnDisk


class Place(enum.Enum):
    """
    Where the guest of a domain is.

    ``DOMAIN``
        where libvirt thinks
    ``TRANSIT``
        it runs in the transit, beside libvirt
    ``KEEPER``
        it is suspended in the keeper
    ``OUTSIDE``
        it is none of libvirt's, and listed because of its hop
    """

    DOMAIN = "domain"
    TRANSIT = "transit"
    KEEPER = "keeper"
    OUTSIDE = "outside"


@dataclass(frozen=True)
class DomainStatus:
    """
    The status of a domain; or of a guest outside libvirt, of which only its hop is known.

    :ivar running_version: the version that runs it; empty when no QEMU does, or its monitor does not answer.
    :ivar binary_state: of the file that its QEMU was started from: ``unchanged``, ``replaced`` or ``deleted``.
    :ivar installed_version: the version that its emulator has on disk now; empty when there is none.
    :ivar operation: its hop in progress, or interrupted; empty when there is none.
    :ivar blocker: why it cannot hop; empty when it can.
    :ivar restart_required: why it cannot hop until it was shut down and started again; empty if that is not why.
    :ivar hint: what to do: so that its hop is finished, if that is not attended; otherwise so that it can hop. Empty
        when nothing is to be done, or is known.
    :ivar place: where its guest is.
    :ivar attended: whether a command is at work on its hop, or there is none; otherwise ``sevhop recover`` must act, or
        for a prepared upgrade somebody must restore the domain.
    :ivar elsewhere_s: seconds since its guest has been in the transit, or suspended in the keeper; None if it is not.
    """

    name: str
    running_version: str = ""
    binary_state: str = ""
    installed_version: str = ""
    operation: str = ""
    blocker: str = ""
    restart_required: str = ""
    hint: str = ""
    place: Place = Place.DOMAIN
    attended: bool = True
    elsewhere_s: float | None = None

    @property
    def outdated(self) -> bool:
        """Whether a hop to the emulator on disk would change something."""
        if not self.running_version or not self.installed_version:
            return False
        return self.running_version != self.installed_version or self.binary_state != OnDisk.UNCHANGED.value

    def as_json(self) -> dict[str, object]:
        """For ``--json``."""
        return asdict(self) | {"place": self.place.value, "outdated": self.outdated}

    def __str__(self) -> str:
        if not self.running_version:
            if self.operation and not self.blocker:
                return f"{self.name}: {self.operation}{self._advice}"
            line = f"{self.name}: {self.blocker or 'no QEMU'}"
        else:
            replaced = "" if self.binary_state == OnDisk.UNCHANGED.value else f" ({self.binary_state} on disk)"
            current = self.installed_version and not self.outdated
            disk = "up to date" if current else f"{self.installed_version or 'none'} is installed"
            able = f"cannot hop: {self.blocker}" if self.blocker else "can hop"
            if self.restart_required:
                able = f"cannot hop until it is shut down and started again: {self.restart_required}"
            line = f"{self.name}: QEMU {self.running_version}{replaced}, {disk}, {able}"
        return line + (f"; {self.operation}" if self.operation else "") + self._advice

    @property
    def _advice(self) -> str:
        """Not twice: what a command has reported of its failure may have it."""
        return f" ({self.hint})" if self.hint and self.hint not in self.operation else ""
