"""vCPUs that were plugged since a QEMU was started. Its command line does not have them, nor has the new QEMU."""

from __future__ import annotations

from typing import Any

from sevhop_qmp.errors import CommandError
from sevhop_qmp.invalid_data import protocol_errors
from sevhop_qmp.monitor import Commands

#: The QOM path of devices that have an id.
_PERIPHERAL = "/machine/peripheral"


async def missing(source: Commands, destination: Commands) -> list[str]:
    """
    Those that the destination does not have.

    :return: for each, the option with which it has that one, such as ``-device host-x86_64-cpu,id=cpu1,socket-id=1``.
    """
    try:
        ours = await source.execute("query-hotpluggable-cpus")
        theirs = await destination.execute("query-hotpluggable-cpus")
    except CommandError:  # a machine type without
        return []
    with protocol_errors(source.name):
        present = [row["props"] for row in theirs if "qom-path" in row]
        return [_option(row) for row in ours if "qom-path" in row and row["props"] not in present]


def _option(row: dict[str, Any]) -> str:
    name = str(row["qom-path"]).removeprefix(f"{_PERIPHERAL}/")
    properties = {} if "/" in name else {"id": name}
    properties |= {str(key): str(value) for key, value in sorted(row["props"].items())}
    return f"-device {row['type']}," + ",".join(f"{key}={value}" for key, value in properties.items())
