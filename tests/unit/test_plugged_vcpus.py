"""The hint for vCPUs that were plugged since the start: what the command line of the new QEMU needs."""

from __future__ import annotations

import asyncio
from typing import Any

from sevhop.guest import plugged_vcpus
from sevhop_qmp.errors import CommandError


class Machine:
    """A monitor that knows one command."""

    name = "vm"

    def __init__(self, rows: list[dict[str, Any]] | None) -> None:
        self._rows = rows

    async def execute(self, command: str, *_: object, **__: object) -> Any:
        if self._rows is None:
            raise CommandError(command, "this machine type has no CPUs that can be plugged")
        return self._rows


def row(thread: int, path: str = "") -> dict[str, Any]:
    props = {"core-id": 0, "node-id": 0, "socket-id": 0, "thread-id": thread}
    return {"type": "host-x86_64-cpu", "vcpus-count": 1, "props": props} | ({"qom-path": path} if path else {})


def missing(source: list[dict[str, Any]] | None, destination: list[dict[str, Any]]) -> list[str]:
    return asyncio.run(plugged_vcpus.missing(Machine(source), Machine(destination)))  # type: ignore[arg-type]


COLD = row(0, "/machine/unattached/device[0]")


def test_plugged_vcpu_is_described_as_an_option() -> None:
    (found,) = missing([row(1, "/machine/peripheral/cpu1"), COLD], [row(1), COLD])
    assert found == "-device host-x86_64-cpu,id=cpu1,core-id=0,node-id=0,socket-id=0,thread-id=1"


def test_plugged_vcpu_without_an_id_is_described_without() -> None:
    (found,) = missing([row(1, "/machine/peripheral-anon/device[0]"), COLD], [row(1), COLD])
    assert found == "-device host-x86_64-cpu,core-id=0,node-id=0,socket-id=0,thread-id=1"


def test_vcpus_that_both_have_are_not_described() -> None:
    assert missing([row(1, "/machine/peripheral/cpu1"), COLD], [row(1, "/machine/unattached/device[1]"), COLD]) == []


def test_machine_without_pluggable_vcpus_has_none() -> None:
    assert missing(None, [COLD]) == []
