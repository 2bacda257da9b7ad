"""
Registers with the C-bit in CR3 arrive in the kernel with the move: adopt.so against the real KVM.

``../contract/test_registers.py`` shows what the kernel demands. The destination is no QEMU but ``stub_qemu.c``, where
the reason is.
"""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sevhop.guest.inspection import SevContext
from sevhop.keeper.handover import SourceHandles
from sevhop.keeper.local import LocalKeeper
from sevhop_qmp import adopt_library

from ..contract.sev import SevVm, contexts

HERE = Path(__file__).parent
#: Declarations of the QEMU functions that adopt.so uses.
DECLARATIONS = HERE.parents[2] / "qmp_ext/adopt"
PATIENCE = 60.0  # seconds; in emulation things take long

C_BIT = 1 << 51
EFER_LMA = 1 << 10
#: CR3 of each vCPU, without the C-bit.
PAGE_TABLES = (0x1000, 0x5000)


@dataclass(frozen=True)
class Said:
    """
    What a destination has reported.

    :ivar steps: name of the step → what came of it; see ``stub_qemu.c``.
    """

    status: int | None
    steps: dict[str, dict[str, str]]
    stderr: str

    def numbers(self, step: str, key: str) -> list[int]:
        """The values of a step that every vCPU takes."""
        return [int(self.steps[f"{step}.{vcpu}"][key], 0) for vcpu in range(len(PAGE_TABLES))]


@pytest.fixture(scope="module")
def stub_qemu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("stub") / "stub_qemu"
    # adopt.so finds QEMU's functions among the program's exported ones.
    flags = ("-O2", "-Wall", "-Wextra", "-Werror", "-rdynamic")
    subprocess.run(["cc", *flags, "-I", DECLARATIONS, "-o", program, HERE / "stub_qemu.c"], check=True)
    return program


@pytest.fixture
def source() -> Iterator[SevVm]:
    with SevVm.launched(vcpus=len(PAGE_TABLES)) as vm:
        yield vm
    assert contexts() == []


def adopting(program: Path, source: SevVm, request: str, *, move: bool = True) -> Said:
    """
    Have a destination adopt the source, with the C-bit in the CR3 of every vCPU.

    :param request: ``sregs`` or ``sregs2``.
    """
    (context,) = contexts()
    handles = SourceHandles(source.descriptor, {"memory-backend-memfd": [source.memory.file]})
    argv = [str(source.descriptor if move else -1), *(hex(table | C_BIT) for table in PAGE_TABLES)]

    async def run() -> tuple[int | None, str, str]:
        with LocalKeeper(handles, SevContext("sev", handle=context.handle)) as keeper:
            socket = keeper.theirs.fileno()
            process = await asyncio.create_subprocess_exec(
                program,
                request,
                *argv,
                env=os.environ | adopt_library.environment(f"fd:{socket}"),
                pass_fds=(socket, source.descriptor),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            async with asyncio.timeout(PATIENCE):
                output, errors = await process.communicate()
            return process.returncode, output.decode(), errors.decode()

    status, output, errors = asyncio.run(run())
    steps = {}
    for line in output.splitlines():
        step, *values = line.split()
        steps[step] = dict(value.split("=", 1) for value in values)
    return Said(status, steps, errors)


@pytest.mark.parametrize("request_name", ["sregs", "sregs2"])
def test_registers_are_in_the_kernel_after_the_move(stub_qemu: Path, source: SevVm, request_name: str) -> None:
    bare, encrypted = list(PAGE_TABLES), [table | C_BIT for table in PAGE_TABLES]

    output = adopting(stub_qemu, source, request_name)

    # Accepted early, as far as QEMU can see; the kernel cannot have them yet.
    assert output.numbers("set", "errno") == [0, 0], output.stderr
    assert output.numbers("before", "shown") == encrypted
    assert output.numbers("before", "kernel") == bare
    assert output.steps["x-sev-migrate-from"] == {
        "errno": "0",
        "name": "OK",
        "vcpus": "2",
        "registers": "2",
        "restore-errno": "0",
    }, output.stderr
    assert output.numbers("after", "kernel") == encrypted
    assert output.numbers("after", "shown") == encrypted
    assert all(efer & EFER_LMA for efer in output.numbers("after", "efer"))
    status = output.steps["x-sev-adopt-status"]
    assert (status["moved"], status["deferred-registers"], status["vm-type"]) == ("true", "0", "0")
    assert output.steps["launch-finish"] == {"errno": "0"}
    assert "run" in output.steps
    assert (output.status, output.stderr) == (0, "")
    # The context was the destination's, and was destroyed with it: the source's VM is still there.
    assert contexts() == []


def test_destination_does_not_run_without_the_context(stub_qemu: Path, source: SevVm) -> None:
    before = contexts()

    output = adopting(stub_qemu, source, "sregs", move=False)

    assert output.numbers("after", "kernel") == list(PAGE_TABLES)
    assert output.steps["x-sev-adopt-status"]["deferred-registers"] == "2"
    assert output.steps["launch-finish"] == {"errno": str(errno.EPERM)}
    assert "run" not in output.steps
    assert output.status == 1
    assert output.stderr.splitlines() == [
        "sevhop adopt: this QEMU has not adopted the guest yet: it must not run",
        "sevhop adopt: this QEMU must not run: the guest's SEV context is still the old QEMU's",
    ]
    assert contexts() == before
