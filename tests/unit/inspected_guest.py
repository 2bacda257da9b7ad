"""A guest as an inspection reports it, without a QEMU."""

from __future__ import annotations

from sevhop.guest.inspection import Guest, SevContext


def guest(**fields: object) -> Guest:
    """One that can hop, but for the fields that are given."""
    values: dict[str, object] = {
        "name": "g",
        "version": "7.2.0",
        "machine_type": "pc-q35-7.2",
        "state": "running",
        "accelerator": "kvm",
        "context": SevContext("none"),
        "vcpu_threads": frozenset({1}),
        "memory": 1 << 20,
        "backends": (),
        "devices": {},
        "blockers": (),
        "jobs": (),
        "blocks": {},
        **fields,
    }
    return Guest(**values)  # type: ignore[arg-type]
