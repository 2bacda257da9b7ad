"""
A client of libvirt's that prints the lifecycle events of all domains, each with its domain and the id that this has
then; run inside a daemon's mount namespace. It prints ``listening`` when it is.
"""

from __future__ import annotations

from typing import Any

import libvirt

#: Of virDomainEventType, and of the details of each.
_EVENTS = {
    name.removeprefix("VIR_DOMAIN_EVENT_"): getattr(libvirt, name)
    for name in (
        "VIR_DOMAIN_EVENT_STARTED",
        "VIR_DOMAIN_EVENT_SUSPENDED",
        "VIR_DOMAIN_EVENT_RESUMED",
        "VIR_DOMAIN_EVENT_STOPPED",
        "VIR_DOMAIN_EVENT_SHUTDOWN",
        "VIR_DOMAIN_EVENT_DEFINED",
        "VIR_DOMAIN_EVENT_UNDEFINED",
    )
}


def _described(event: int, detail: int) -> str:
    name = next((name for name, number in _EVENTS.items() if number == event), str(event))
    prefix = f"VIR_DOMAIN_EVENT_{name}_"
    details = {key.removeprefix(prefix): getattr(libvirt, key) for key in dir(libvirt) if key.startswith(prefix)}
    which = next((key for key, number in details.items() if number == detail), str(detail))
    return f"{name.lower()} {which.lower()}"


def _received(connection: Any, domain: Any, event: int, detail: int, opaque: None) -> None:
    print(domain.name(), domain.ID(), _described(event, detail), flush=True)


def main() -> None:
    """The program; it ends when it is killed."""
    libvirt.virEventRegisterDefaultImpl()
    connection = libvirt.open("qemu:///system")
    connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, _received, None)
    print("listening", flush=True)
    while True:
        libvirt.virEventRunDefaultImpl()


if __name__ == "__main__":
    main()
