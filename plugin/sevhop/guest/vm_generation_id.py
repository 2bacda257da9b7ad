"""
The VM generation ID, which a ``vmgenid`` device reports to the guest. A guest with another one takes itself for a copy.
"""

from __future__ import annotations

import json
import re

from sevhop_qmp.invalid_data import protocol_errors
from sevhop_qmp.monitor import Commands

from .absent import unless_absent
from .command_line import parse


async def read(monitor: Commands) -> str:
    """
    The ID of a guest; empty if it has none.

    :raises SevhopError: QEMU does not answer, or refuses.
    """
    answer = await unless_absent(monitor, "query-vm-generation-id")
    return str(answer["guid"]) if answer else ""


async def pinned(arguments: list[str], monitor: Commands) -> list[str]:
    """
    The destination's arguments with the values that the source has generated: a guest with another VM generation ID
    takes itself for a copy.

    :raises SevhopError: QEMU does not answer.
    """
    with protocol_errors(monitor.name):
        guid = await read(monitor)
    if not guid:
        return arguments
    result: list[str] = []
    for option in parse(arguments):
        props = option.properties()
        if option.name == "device" and props.get("", props.get("driver")) == "vmgenid":
            result += ["-device", _with_guid(option.value or "", guid)]
        else:
            result += option.argv()
    return result


def _with_guid(value: str, guid: str) -> str:
    if value.startswith("{"):
        return json.dumps(json.loads(value) | {"guid": guid})
    parts = [part for part in re.split(r"(?<!,),(?!,)", value) if not part.startswith("guid=")]
    return ",".join([*parts, f"guid={guid}"])
