"""The flag for which a QEMU saves no vCPU state: found in a process, cleared, and set again."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sevhop.engine import protected_state as engine
from sevhop.engine.transaction import RollbackStack
from sevhop_qmp import protected_state
from sevhop_qmp.errors import ProcessError, StateError
from sevhop_qmp.exported import build_id
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.protected_state import ProtectedState, has_flag

OFFSET = 113
#: A library that is taken for a part of QEMU by its name, since it is in our own process.
_LIBRARY = f"""
static unsigned char state[512] = {{[{OFFSET}] = 1}};
unsigned char *kvm_state = state;
void kvm_mark_guest_state_protected(void) {{ state[{OFFSET}] = 1; }}
"""


@pytest.fixture
def ourselves() -> Iterator[QemuProcess]:
    process = QemuProcess.open(os.getpid())
    yield process
    process.close()


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> ctypes.Array[ctypes.c_ubyte]:
    """The KVMState of this process, which is a QEMU from now on."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler is installed")
    library = tmp_path_factory.mktemp("exported") / "qemu-exported.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, "-x", "c", "-"], input=_LIBRARY, text=True, check=True)
    pointer = ctypes.POINTER(ctypes.c_ubyte * 512).in_dll(ctypes.CDLL(str(library)), "kvm_state")
    return pointer.contents


class Hop:
    """As much of a transaction as the flag needs."""

    def __init__(self) -> None:
        self.rollback = RollbackStack()
        self.resources = contextlib.ExitStack()


def test_process_without_kvm_state_has_no_flag() -> None:
    child = subprocess.Popen(["sleep", "60"])
    process = QemuProcess.open(child.pid)
    try:
        assert not has_flag(process, "7.2.22")
        assert not has_flag(process, "9.0.4")
        assert has_flag(process, "9.1.0"), "it must have one, exported or not"
        with pytest.raises(ProcessError, match="does not export kvm_state"):
            ProtectedState(process, OFFSET)
    finally:
        child.kill()
        child.wait()
        process.close()


def test_flag_is_recognized_by_the_function_that_sets_it(
    ourselves: QemuProcess, state: ctypes.Array[ctypes.c_ubyte]
) -> None:
    assert has_flag(ourselves, "7.2.22")


def test_flag_is_cleared_and_set_again(ourselves: QemuProcess, state: ctypes.Array[ctypes.c_ubyte]) -> None:
    before = bytes(state)
    with ProtectedState(ourselves, OFFSET) as flag:
        assert flag.protected() == 1
        flag.clear()
        assert (flag.protected(), bytes(state)) == (0, bytes(512))
        flag.restore()
        assert (flag.protected(), bytes(state)) == (1, before)


@pytest.mark.parametrize(("value", "then"), [(0, 1), (1, 1), (7, 7)])
def test_only_a_cleared_flag_is_set_by_a_recovery(
    value: int, then: int, ourselves: QemuProcess, state: ctypes.Array[ctypes.c_ubyte]
) -> None:
    state[OFFSET] = value
    engine.restore(ourselves, OFFSET)
    assert state[OFFSET] == then
    state[OFFSET] = 1


def test_recovery_without_a_flag_or_a_source_does_nothing(ourselves: QemuProcess) -> None:
    engine.restore(ourselves, 0)
    engine.restore(None, OFFSET)


def test_flag_is_set_again_by_a_rollback(ourselves: QemuProcess, state: ctypes.Array[ctypes.c_ubyte]) -> None:
    hop = Hop()
    with hop.resources:
        flag = engine.open_flag(hop, ourselves, OFFSET)  # type: ignore[arg-type]
        assert state[OFFSET] == 1
        engine.clear(hop, flag)  # type: ignore[arg-type]
        assert state[OFFSET] == 0
        asyncio.run(hop.rollback.unwind())
        assert state[OFFSET] == 1


def test_flag_stays_cleared_after_the_commit(ourselves: QemuProcess, state: ctypes.Array[ctypes.c_ubyte]) -> None:
    """The source does not run any more, and writing to it would be one more step."""
    hop = Hop()
    with hop.resources:
        engine.clear(hop, engine.open_flag(hop, ourselves, OFFSET))  # type: ignore[arg-type]
        hop.rollback.clear()
    assert state[OFFSET] == 0
    state[OFFSET] = 1


def test_flag_that_is_not_set_is_not_touched(ourselves: QemuProcess, state: ctypes.Array[ctypes.c_ubyte]) -> None:
    state[OFFSET] = 2
    hop = Hop()
    try:
        with pytest.raises(StateError, match="not set any more"):
            engine.open_flag(hop, ourselves, OFFSET)  # type: ignore[arg-type]
        with pytest.raises(StateError, match="not set any more"), engine.cleared(ourselves, OFFSET):
            pytest.fail("it was cleared")
        assert state[OFFSET] == 2
    finally:
        state[OFFSET] = 1


def test_flag_is_cleared_during_a_rehearsal_only(ourselves: QemuProcess, state: ctypes.Array[ctypes.c_ubyte]) -> None:
    with pytest.raises(KeyError), engine.cleared(ourselves, OFFSET):
        assert state[OFFSET] == 0
        raise KeyError
    assert state[OFFSET] == 1
    with engine.cleared(ourselves, 0):
        assert state[OFFSET] == 1, "a source without a flag"


def test_source_without_a_flag_has_nothing_to_undo(ourselves: QemuProcess) -> None:
    hop = Hop()
    engine.clear(hop, engine.open_flag(hop, ourselves, 0))  # type: ignore[arg-type]
    assert hop.rollback._undos == []


def test_exit_of_the_source_is_reported(state: ctypes.Array[ctypes.c_ubyte]) -> None:
    child = subprocess.Popen(["sleep", "60"])
    process = QemuProcess.open(child.pid)
    child.kill()
    child.wait()
    with pytest.raises(ProcessError):
        protected_state.restore(process, OFFSET)
    engine.restore(process, OFFSET)
    process.close()


def test_build_id_is_that_of_the_program() -> None:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    child = subprocess.Popen(["sleep", "60"])
    process = QemuProcess.open(child.pid)
    try:
        notes = subprocess.run(
            ["readelf", "-n", Path(f"/proc/{child.pid}/exe")], capture_output=True, text=True, check=True
        ).stdout
        found = re.search(r"Build ID: ([0-9a-f]+)", notes)
        assert build_id(process) == (found[1] if found else "")
    finally:
        child.kill()
        child.wait()
        process.close()
