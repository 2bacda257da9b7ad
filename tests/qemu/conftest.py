"""
Tests that run real QEMU processes.

Every guest lives in the test's own temporary directory and is killed by pid when the test ends. After each test
nothing may be left: no process with that directory on its command line, no child, no file in /dev/shm, no entry in
the product's run directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from sevhop.checks import sev_host
from sevhop.records import journal
from sevhop_qmp.run_mark import RunMark

from tests.support.guests import counter, emulators, linux, real_mode
from tests.support.guests.build import Unavailable
from tests.support.guests.machine import Accelerator, Machine
from tests.support.guests.running import Guest, processes_of

from .adopting import Keeper, Memory, build, fails_to_start, machine, sev_guest

#: Starts a guest in an emulator; the guest is killed when the test ends.
StartGuest = Callable[[Machine, Path], Guest]
#: Describes a bare-metal counter; keywords are fields of :class:`tests.support.guests.machine.Machine`.
DescribeCounter = Callable[..., Machine]
#: Describes the Linux guest, likewise.
DescribeLinux = Callable[..., Machine]
#: Starts an SEV-ES guest in a QEMU of this label.
StartEs = Callable[[str], Guest]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartGuest]:
    """Start guests that are killed when the test ends, at the latest."""
    with ExitStack() as guests:
        yield lambda machine, emulator: guests.enter_context(Guest.start(machine, emulator))


@pytest.fixture
def counter_machine(tmp_path: Path, accelerator: Accelerator) -> DescribeCounter:
    """Describe a machine that runs the bare-metal counter, with the accelerator that this host has."""
    try:
        firmware = counter.firmware()
    except Unavailable as err:
        pytest.skip(f"the bare-metal counter cannot be built: {err}")

    def describe(**fields: object) -> Machine:
        described: dict[str, object] = {"accelerator": accelerator, "bios": firmware, "memory_mib": 32, **fields}
        return Machine(tmp_path, **described)  # type: ignore[arg-type]

    return describe


@pytest.fixture(scope="session")
def _linux_images() -> None:
    try:
        linux.images()
    except Unavailable as err:
        pytest.skip(f"the Linux guest cannot be built: {err}")


@pytest.fixture
def linux_machine(tmp_path: Path, _linux_images: None) -> DescribeLinux:
    """Describe a machine that runs the Linux guest, under TCG: it must run everywhere."""

    def describe(**fields: object) -> Machine:
        return linux.on(Machine(tmp_path, **fields))  # type: ignore[arg-type]

    return describe


@pytest.fixture
def kvm(accelerator: Accelerator) -> Accelerator:
    if accelerator != "kvm":
        pytest.skip("KVM is not usable here")
    return accelerator


@pytest.fixture
def qemu(request: pytest.FixtureRequest, emulator: Callable[[str], Path]) -> Path:
    """The emulator under test: the older one, unless a test names others."""
    return emulator(getattr(request, "param", emulators.OLD))


@pytest.fixture
def memory() -> Iterator[Memory]:
    with Memory() as memory:
        yield memory


@pytest.fixture
def run_mark() -> Iterator[RunMark]:
    mark = RunMark.create()
    yield mark
    mark.close()


@pytest.fixture
def keeper(memory: Memory) -> Iterator[Keeper]:
    with Keeper([memory]) as keeper:
        yield keeper


@pytest.fixture
def vm(kvm: Accelerator) -> Iterator[int]:
    """A KVM VM, as a source's."""
    create_vm = 0xAE01
    with open("/dev/kvm", "rb") as device:
        vm = fcntl.ioctl(device, create_vm, 0)
    yield vm
    os.close(vm)


@pytest.fixture(scope="session")
def fake_kernel(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The library that plays SEV."""
    directory = tmp_path_factory.mktemp("fake")
    return str(build(Path(__file__).with_name("fake_sev_kernel.c"), directory / "fake_sev_kernel.so"))


@pytest.fixture(scope="session")
def c_bit(emulator: Callable[[str], Path], fake_kernel: str) -> int:
    """Where this machine's CPUID says that the C-bit is, with or without SEV: QEMU insists on it."""
    arguments = [*machine("kvm", *sev_guest(63)), "-S"]
    _, lines = fails_to_start(emulator(emulators.OLD), arguments, {**os.environ, "LD_PRELOAD": fake_kernel})
    found = re.search(r"host '(\d+)' requested '63'", "\n".join(lines))
    assert found, lines
    return int(found[1])


@pytest.fixture
def start_es(
    kvm: Accelerator,
    tmp_path: Path,
    fake_kernel: str,
    c_bit: int,
    emulator: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[StartEs]:
    """
    Start SEV-ES guests whose kernel is played (``fake_sev_kernel.c``). Nothing is encrypted, so they run as any other.
    """
    monkeypatch.setattr(sev_host, "examine", lambda *_, **__: [])
    machine = Machine(
        tmp_path,
        accelerator=kvm,
        memory_mib=32,
        bios=real_mode.firmware(),
        cpus=2,
        more=tuple(sev_guest(c_bit, "sev-es")),
    )
    with ExitStack() as guests:

        def start(label: str) -> Guest:
            with monkeypatch.context() as source:
                source.setenv("LD_PRELOAD", fake_kernel)
                source.setenv("FAKE_SEV_LAUNCH", "1")
                guest = guests.enter_context(Guest.start(machine, emulator(label)))
            guest.wait_for_ticks(5)
            return guest

        yield start


def _children() -> set[int]:
    while True:
        # A thread that exits meanwhile leaves its children to another one, which may have been read already.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return {
                int(pid)
                for thread in os.listdir("/proc/self/task")
                for pid in Path(f"/proc/self/task/{thread}/children").read_text().split()
            }


def _left_over(directory: Path) -> dict[str, set[str]]:
    run_directory = Path("/run/sevhop")
    return {
        "processes": {str(pid) for pid in processes_of(directory)},
        "children": {str(pid) for pid in _children()},
        "/dev/shm": set(os.listdir("/dev/shm")),
        "/run/sevhop": set(os.listdir(run_directory)) if run_directory.is_dir() else set(),
        "journals": {str(path) for path in journal.journals()},
    }


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """Fail a test that leaves something behind."""
    before = _left_over(tmp_path)
    yield
    # A destination is the child of whoever ran the engine, and that may have been the test.
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    after = _left_over(tmp_path)
    left = {kind: names - before[kind] for kind, names in after.items() if names - before[kind]}
    # So that the next test does not find it.
    for path in left.get("journals", set()):
        Path(path).unlink(missing_ok=True)
    for name in left.get("/run/sevhop", set()):
        shutil.rmtree(Path("/run/sevhop", name), ignore_errors=True)
    assert not left, f"left behind: {left}"
