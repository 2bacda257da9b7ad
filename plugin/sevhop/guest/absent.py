"""Queries for what a QEMU need not have: a command of newer versions, a device, a property."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sevhop_qmp.errors import CommandError
from sevhop_qmp.monitor import Commands

#: Error classes (qapi/error.json) of commands, devices and backends that this QEMU does not have.
_ABSENT = frozenset({"CommandNotFound", "DeviceNotFound", "DeviceNotActive"})
#: Of the same class as any other error: a property (qom/object.c), or the device of a query (hw/acpi/vmgenid.c).
_NOT_FOUND = "not found"


async def unless_absent(monitor: Commands, command: str, arguments: Mapping[str, object] | None = None) -> Any:
    """
    What a command returns; None where this QEMU does not know it, or does not have what it asks for.

    :raises CommandError: QEMU refuses for another reason.
    :raises MonitorError: QEMU does not answer.
    """
    try:
        return await monitor.execute(command, arguments)
    except CommandError as err:
        if err.error_class in _ABSENT or err.desc.endswith(_NOT_FOUND):
            return None
        raise
