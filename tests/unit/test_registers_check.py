"""The check of what an SEV-ES guest has besides its encrypted registers: what is refused, and with which hint."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from sevhop.checks import registers
from sevhop.checks.registers import Registers
from sevhop.checks.result import CheckResult, Status
from sevhop.guest.inspection import SevContext
from sevhop_qmp import adopt_library, exported
from sevhop_qmp.errors import ProcessError, SevhopError
from sevhop_qmp.process import Descriptor

from .inspected_guest import guest

ES = SevContext("sev-es", 5, device="/dev/sev")
OFFSET = 113


class Flag:
    """In the place of :class:`sevhop_qmp.protected_state.ProtectedState`."""

    value = 1

    def __init__(self, process: object, offset: int) -> None:
        assert offset == OFFSET

    def __enter__(self) -> Flag:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def protected(self) -> int:
        return self.value


class Source:
    """A process with KVM vCPUs, and the monitor of its QEMU."""

    pid = 0
    name = "source"
    vcpus = 2
    in_kernel = 2
    hotplugged = -1

    def descriptors(self) -> list[Descriptor]:
        return [Descriptor(7, "anon_inode:kvm-vm")] + [
            Descriptor(8 + 2 * number + what, f"anon_inode:kvm-{name}:{number}")
            for number in range(self.in_kernel)
            for what, name in enumerate(("vcpu", "vcpu-stats"))
        ]

    async def execute(self, command: str, arguments: dict[str, str] | None = None) -> Any:
        if command == "query-cpus-fast":
            return [{"cpu-index": number, "qom-path": f"/cpu/{number}"} for number in range(self.vcpus)]
        assert command == "qom-get" and arguments is not None
        assert arguments["property"] == "hotplugged"
        return arguments["path"] == f"/cpu/{self.hotplugged}"


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.setattr(registers, "ProtectedState", Flag)
    monkeypatch.setattr(registers, "has_flag", lambda *_: True)
    monkeypatch.setattr(exported, "build_id", lambda _: "a build")
    return Source()


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """How often the source's program was started; what the next one is to find."""
    found: list[object] = []

    async def find(context: SevContext, *_: object) -> int:
        found.append(context)
        return OFFSET

    monkeypatch.setattr(registers, "_find", find)
    registers._offsets.clear()
    yield found
    registers._offsets.clear()


def examine(source: Source, context: SevContext = ES, version: str = "10.0.13") -> Registers:
    found = guest(context=context, version=version, vcpu_threads=frozenset(range(source.vcpus)))
    return asyncio.run(registers.examine(found, source, source))  # type: ignore[arg-type]


def failure(found: Registers) -> CheckResult:
    assert found.result is not None
    assert found.result.status is Status.FAIL
    assert found.result.hint
    assert found.flag == 0
    return found.result


@pytest.mark.parametrize("kind", ["none", "sev"])
def test_guest_with_open_registers_is_not_tested(kind: str, source: Source) -> None:
    assert examine(source, SevContext(kind)) == Registers()


def test_typed_vm_is_not_tested(source: Source) -> None:
    found = examine(source, SevContext("sev-es", 5, typed=True))
    assert found.result is not None
    assert (found.result.status, found.flag) == (Status.SKIP, 0)


def test_source_without_the_flag_passes(source: Source, starts: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registers, "has_flag", lambda *_: False)
    found = examine(source, version="7.2.22")
    assert found.result is not None
    assert (found.result.status, found.flag, starts) == (Status.PASS, 0, [])


def test_program_is_started_once_for_each_build(
    source: Source, starts: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        found = examine(source)
        assert found.result is not None
        assert (found.result.status, found.flag) == (Status.PASS, OFFSET)
    assert len(starts) == 1
    monkeypatch.setattr(exported, "build_id", lambda _: "another")
    examine(source)
    assert len(starts) == 2
    monkeypatch.setattr(exported, "build_id", lambda _: "")
    examine(source)
    examine(source)
    assert len(starts) == 4, "two builds without an ID are not distinguished"


@pytest.mark.parametrize("offset", [-1, 0, 512])
def test_flag_outside_what_is_searched_is_not_believed(
    offset: int, source: Source, starts: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def find(*_: object) -> int:
        return offset

    monkeypatch.setattr(registers, "_find", find)
    assert "adopt.so does not find" in failure(examine(source)).detail
    assert registers._offsets == {}


def test_flag_that_is_not_found_fails(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    async def none(*_: object) -> int:
        return 0

    registers._offsets.clear()
    monkeypatch.setattr(registers, "_find", none)
    assert "does not find" in failure(examine(source)).detail
    assert registers._offsets == {}


def test_program_that_cannot_be_started_fails(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*_: object) -> int:
        raise SevhopError("its program cannot be started once more: no /dev/kvm")

    registers._offsets.clear()
    monkeypatch.setattr(registers, "_find", fails)
    assert failure(examine(source)).detail == (
        "cannot have QEMU 10.0.13 save all vCPU state: its program cannot be started once more: no /dev/kvm"
    )


@pytest.mark.parametrize(("value", "hint"), [(0, registers._CLEARED), (2, registers._HINT)])
def test_flag_that_is_not_set_fails(
    value: int, hint: str, source: Source, starts: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flag, "value", value)
    found = failure(examine(source))
    assert f"its flag guest_state_protected is {value}, not 1" in found.detail
    assert found.hint == hint


def test_vcpu_that_was_not_launched_fails(source: Source) -> None:
    source.hotplugged = 1
    assert "vCPU 1 was plugged after the launch" in failure(examine(source)).detail


def test_vcpu_that_was_unplugged_fails(source: Source) -> None:
    """KVM cannot forget a vCPU, and compares how many both VMs have."""
    source.in_kernel = 3
    assert "KVM has 3 vCPUs, and the destination would have 2" in failure(examine(source)).detail


def test_exit_of_the_source_fails(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def exited(*_: object) -> bool:
        raise ProcessError("process 1 has exited")

    monkeypatch.setattr(registers, "has_flag", exited)
    assert "process 1 has exited" in failure(examine(source)).detail


@pytest.mark.parametrize(
    ("output", "errors", "reason"),
    [
        (b"", b"qemu: one\nqemu: two\n", "qemu: two"),
        (b'{"QMP": {}}\n{"return": {}}\n{"error": {}}\n', b"", "no reason given"),
        (b'{"return": []}\n', b"", "no reason given"),
        (b'{"return": {"protected-state-offset": []}}\n', b"", "no reason given"),
        (b"1\n", b"", "no reason given"),
        (b"\xff\n", b"", "no reason given"),
    ],
)
def test_answers_that_make_no_sense_are_reported(output: bytes, errors: bytes, reason: str) -> None:
    with pytest.raises(SevhopError, match=f"cannot be started once more: {reason}"):
        registers._parse(output, errors)


def test_offset_is_read_from_the_answers() -> None:
    output = b'{"QMP": {}}\n{"return": {}}\n{"return": {"protected-state-offset": 113}}\n{"return": {}}\n'
    assert registers._parse(output, b"") == 113


def test_root_gets_nothing_of_the_environment_of_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU can write there, and root executes what enters its namespaces."""
    hostile = SimpleNamespace(
        pid=1,
        environment={"LD_PRELOAD": "/tmp/evil.so", "PATH": "/tmp", "GCONV_PATH": "/tmp"},
        namespace=lambda _: "mnt:[1]",
        credentials=SimpleNamespace(uid=107, gid=107, groups=()),
    )
    given: list[dict[str, str]] = []

    def start(*_: object, env: dict[str, str], **__: object) -> None:
        given.append(env)
        raise OSError

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(SevhopError):
        registers._run(hostile, ["program"], "fd:3", [])  # type: ignore[arg-type]
    (environment,) = given
    assert set(environment) == {"PATH", "LD_PRELOAD", "SEVHOP_KEEPER"}
    assert environment["PATH"] == os.defpath
    assert environment["LD_PRELOAD"] == str(adopt_library.path())
