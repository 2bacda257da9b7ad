"""What a reboot of the guest will be after a hop. Nothing here fails: it is for the administrator to know."""

from __future__ import annotations

from ..guest import reboot
from ..guest.inspection import Guest
from .result import CheckResult, passed

_ARGUMENTS = "-machine aux-ram-share=on"
_XML_ARGUMENTS = "<qemu:arg value='-machine'/><qemu:arg value='aux-ram-share=on'/>"


def standalone(guest: Guest) -> list[CheckResult]:
    """Of a guest outside libvirt; none without an SEV context."""
    return _results(guest, "a shutdown after the hop", _ARGUMENTS)


def domain(guest: Guest, on_reboot: str, *, persistent: bool) -> list[CheckResult]:
    """
    Of a domain; none without an SEV context.

    :param on_reboot: the action in its XML.
    :param persistent: a transient domain is unknown to libvirt when its QEMU has exited.
    """
    if not persistent:
        return _results(guest, "a shutdown after the hop, with which a transient domain is gone", _XML_ARGUMENTS)
    then = "starts the domain again" if on_reboot == "restart" else "leaves the domain off"
    return _results(guest, f"a shutdown after the hop, and <on_reboot> ({on_reboot}) {then}", _XML_ARGUMENTS)


def _results(guest: Guest, shutdown: str, arguments: str) -> list[CheckResult]:
    if guest.context.kind == "none":
        return []
    name = "reboot"
    if not reboot.stops(guest):
        return [passed(name, "as before the hop: the firmware is in shared memory")]
    if guest.context.kind == "sev-es":
        return [passed(name, f"{shutdown}: no QEMU can reset an SEV-ES guest after a hop")]
    result = passed(name, f"{shutdown}: the encrypted firmware is private to the old QEMU")
    result.hint = f"for a reboot as before, start it in QEMU 10.0 or later with {arguments}"
    return [result]
