"""
adopt.so in stock QEMUs: what it does to a destination, command by command, and what it leaves alone.

SEV is played by a library of the test's own, preloaded behind adopt.so (see fake_sev_kernel.c); the real kernel's part
is tested in the lab.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import errno
import os
import re
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sevhop.engine.realtime import boosted
from sevhop_qmp import adopt, adopt_library, device_state
from sevhop_qmp.errors import CommandError, MonitorError
from sevhop_qmp.peer import peer_credentials
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.protected_state import ProtectedState, has_flag
from sevhop_qmp.run_mark import RunMark, RunState

from tests.support.guests import emulators
from tests.support.guests.build import ROOT
from tests.support.guests.machine import OVMF_CODE, Q35, Accelerator
from tests.support.guests.running import wait_until

from .adopting import (
    BACKEND,
    EVERY_EMULATOR,
    RAM,
    TIMEOUT,
    Destination,
    Keeper,
    Memory,
    build,
    fails_to_start,
    machine,
    preloaded,
    refused,
    serve,
    sev_guest,
    sockaddr,
    unread,
)

#: Where `-device loader` writes at start-up: a guest-physical address.
LOADED_AT = 0x100000
LOADED = 0x1122334455667788
LOADER = ("-device", f"loader,addr={LOADED_AT:#x},data={LOADED:#x},data-len=8")


def inspect(memory: Destination, address: int) -> int:
    """Eight bytes of guest memory as the destination sees them."""
    answer = memory.hmp(f"xp /1gx {address:#x}")
    return int(answer.split(":")[1], 16)


# ---- the library itself ----


def test_library_loads_into_older_c_libraries() -> None:
    """Debian 12's C library is 2.36, whatever the machine that builds has."""
    symbols = subprocess.run(["nm", "-D", adopt_library.path()], capture_output=True, text=True, check=True).stdout
    assert "__isoc23_" not in symbols
    versions = [(int(major), int(minor)) for major, minor in re.findall(r"@GLIBC_(\d+)\.(\d+)", symbols)]
    assert versions and max(versions) <= (2, 36)


def test_library_exports_only_what_it_interposes() -> None:
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", adopt_library.path()], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1] for line in listed.stdout.splitlines()}
    assert names == set(
        "ioctl memfd_create mmap mmap64 munmap madvise mlockall readv ftruncate ftruncate64 fallocate fallocate64 "
        "fcntl fcntl64 open open64 __open_2 __open64_2 fopen fopen64 posix_fadvise posix_fadvise64 bind unlink listen "
        "accept accept4 __libc_start_main".split()
    )


def test_library_is_inactive_in_other_programs(tmp_path: Path) -> None:
    """A wrapper script's shell must hand the environment on to the QEMU that it starts."""
    environment = preloaded("/no/keeper", 2)
    done = subprocess.run(
        ["/bin/sh", "-c", "echo $LD_PRELOAD $SEVHOP_KEEPER $SEVHOP_STDERR; cat < /dev/null"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(adopt_library.path()), "/no/keeper", "2"]
    assert not done.stderr


@EVERY_EMULATOR
def test_qemu_lists_the_adopt_commands(qemu: Path, accelerator: Accelerator, keeper: Keeper) -> None:
    with Destination.adopting(qemu, machine(accelerator), keeper) as destination:
        listed = {command["name"] for command in destination.execute("query-commands")}
        assert listed >= set(adopt_library.COMMANDS)


@EVERY_EMULATOR
def test_memory_is_not_adopted_without_a_keeper(qemu: Path, accelerator: Accelerator) -> None:
    environment = {**os.environ, "LD_PRELOAD": str(adopt_library.path())}
    with Destination([qemu, *machine(accelerator, incoming=False)], environment) as plain:
        status = plain.status()
        assert (status.context, status.source, status.ram, status.memfds) == ("none", "none", "none", ())
        with pytest.raises(CommandError, match="No guest memory was adopted"):
            plain.adopt_ram()
        plain.execute("cont")
        assert plain.execute("query-status")["running"]


@EVERY_EMULATOR
def test_library_does_nothing_if_the_hop_is_over(qemu: Path, accelerator: Accelerator, tmp_path: Path) -> None:
    """As in a QEMU that is started with a copy of the XML of a domain that has hopped, on any host."""
    gone = tmp_path / "gone"
    environment = preloaded(str(gone / "keeper")) | {"SEVHOP_MONITOR": str(gone / "monitor" / "qmp")}
    with Destination([qemu, *machine(accelerator, incoming=False)], environment) as plain:
        listed = {command["name"] for command in plain.execute("query-commands")}
        assert listed.isdisjoint(adopt_library.COMMANDS)
        plain.execute("cont")
        assert plain.execute("query-status")["running"]


@EVERY_EMULATOR
def test_destination_opens_the_monitor_of_the_keeper(
    qemu: Path, accelerator: Accelerator, keeper: Keeper, tmp_path: Path
) -> None:
    """It is not on the command line. A comma in its path is part of that."""
    path, ours = tmp_path / "a,b", keeper.theirs.fileno()
    environment = preloaded(f"fd:{ours}") | {"SEVHOP_MONITOR": str(path)}
    with Destination([qemu, *machine(accelerator)], environment, [ours]), socket.socket(socket.AF_UNIX) as monitor:
        monitor.connect(str(path))
        assert monitor.recv(4096).startswith(b'{"QMP": ')


@EVERY_EMULATOR
def test_save_image_without_ram_is_not_loaded_without_the_hook(
    qemu: Path, accelerator: Accelerator, tmp_path: Path
) -> None:
    environment = preloaded(str(tmp_path / "gone" / "keeper")) | {"SEVHOP_IMAGE": "without RAM"}
    status, lines = fails_to_start(qemu, machine(accelerator), environment)
    assert status == 1
    assert len(lines) == 1
    assert lines[0].startswith("sevhop adopt: the save image of a hop has no RAM, and was restored without the hook")


# ---- memory ----


@EVERY_EMULATOR
@pytest.mark.parametrize("prealloc", ["", ",prealloc=on"])
def test_destination_start_does_not_change_guest_memory(
    qemu: Path, accelerator: Accelerator, memory: Memory, keeper: Keeper, prealloc: str
) -> None:
    before = memory.digest()
    with Destination.adopting(qemu, machine(accelerator, *LOADER, backend=prealloc), keeper) as destination:
        # QEMU has written at start-up, into a copy.
        assert inspect(destination, LOADED_AT) == LOADED
        assert memory.digest() == before
        assert destination.mapping(memory) == ["rw-p"]
        assert destination.copied(memory) < 1 << 20, "preallocation would copy all of it"
        status = destination.status()
        assert (status.ram, status.source) == ("private", "running")
        assert status.memfds == (adopt.AdoptedMemfd(BACKEND, RAM, memory.inode),)

        assert destination.adopt_ram() == adopt.AdoptedRam(mappings=1, size=RAM)
        assert destination.mapping(memory) == ["rw-s"]
        assert memory.digest() == before
        assert inspect(destination, LOADED_AT) == int.from_bytes(memory.read(LOADED_AT, 8), "little") != LOADED
        # What is written in the guest's memory is seen, and written, by both.
        os.pwrite(memory.fd, LOADED.to_bytes(8, "little"), 0x2000)
        assert inspect(destination, 0x2000) == LOADED
        assert destination.status().ram == "shared"
        assert destination.adopt_ram() == adopt.AdoptedRam(mappings=1, size=RAM)
    assert len([link for link in keeper.requests if BACKEND in link]) == 1


@EVERY_EMULATOR
def test_memory_is_mapped_at_once_after_the_source_has_exited(
    qemu: Path, accelerator: Accelerator, memory: Memory
) -> None:
    """... but not before start-up has written what it writes."""
    before = memory.digest()
    disks = [
        *["-blockdev", "null-co,node-name=one,size=1048576", "-device", "ide-hd,drive=one"],
        *["-blockdev", "null-co,node-name=two,size=1048576", "-device", "virtio-blk-pci,drive=two"],
    ]
    with (
        Keeper([memory], source="ended") as keeper,
        Destination.adopting(qemu, machine(accelerator, *LOADER, *disks), keeper) as destination,
    ):
        assert destination.mapping(memory) == ["rw-s"]
        assert (destination.status().ram, destination.status().source) == ("shared", "ended")
        assert memory.digest() == before
        assert destination.adopt_ram() == adopt.AdoptedRam(mappings=1, size=RAM)


@EVERY_EMULATOR
def test_memory_is_mapped_when_the_device_state_arrives(
    qemu: Path, accelerator: Accelerator, memory: Memory, keeper: Keeper
) -> None:
    """The header of the stream does not depend on the guest, and may be read while the source runs."""
    head = device_state.header(Q35)
    reader, writer = os.pipe()
    with Destination.adopting(qemu, machine(accelerator), keeper) as destination:
        assert destination.adopt_ram_with(reader, len(head)) == adopt.AdoptedRam(mappings=1, size=RAM)
        destination.send_fd("incoming", reader)
        destination.execute("migrate-incoming", {"uri": "fd:incoming"})
        os.write(writer, head)
        wait_until(lambda: unread(reader) == 0, TIMEOUT, "the head is read")
        assert (destination.status().ram, destination.mapping(memory)) == ("private", ["r--s"])
        # The beginning of a section. The source may still be saving what is in it.
        os.write(writer, b"\4")
        # In several parts, the last of them at last.
        wait_until(lambda: destination.status().ram == "shared", TIMEOUT, "the memory is mapped")
        assert set(destination.mapping(memory)) == {"rw-s"}
        assert not any(request == "run" for request in keeper.requests)
    os.close(reader)
    os.close(writer)


def test_adopt_ram_refuses_unusable_stream_arguments(qemu: Path, accelerator: Accelerator, keeper: Keeper) -> None:
    with Destination.adopting(qemu, machine(accelerator), keeper) as destination, open(os.devnull) as file:
        command = "x-sev-adopt-ram"
        for arguments, reason in (
            ({"stream": "none", "header-size": 1}, "File descriptor named 'none' has not been found"),
            ({"stream": 3, "header-size": -1}, "Invalid parameter type for 'stream', expected: string"),
            ({"stream": 3, "header-size": 1}, "Invalid parameter type for 'stream', expected: string"),
            ({"stream": "given"}, "Parameter 'header-size' is missing, or no size"),
            ({"stream": "given", "header-size": -1}, "Parameter 'header-size' is missing, or no size"),
            ({"stream": "given", "header-size": 1, "more": 1}, "Parameter is unexpected"),
            ({"header-size": 1}, "Parameter is unexpected"),
        ):
            destination.send_fd("given", file.fileno())
            with pytest.raises(CommandError, match=reason):
                destination.execute(command, arguments)
        assert destination.status().ram == "private"


@EVERY_EMULATOR
def test_cpu_hides_false_properties_while_libvirt_waits(qemu: Path, accelerator: Accelerator, memory: Memory) -> None:
    """libvirt queries each boolean while the guest is stopped, and uses those that are true."""
    cpu = "/machine/unattached/device[0]"

    def matters(destination: Destination, entry: dict[str, str]) -> bool:
        get = {"path": cpu, "property": entry["name"]}
        return entry["type"] != "bool" or destination.execute("qom-get", get)

    with (
        Keeper([memory], source="ended") as keeper,
        Destination.adopting(qemu, machine(accelerator), keeper) as destination,
    ):
        short, other = (destination.execute("qom-list", {"path": path}) for path in (cpu, "/machine"))
        with pytest.raises(CommandError, match="not found"):
            destination.execute("qom-list", {"path": "/nowhere"})
        destination.finish()
        complete = destination.execute("qom-list", {"path": cpu})
        assert short == [entry for entry in complete if matters(destination, entry)]
        assert len(short) < len(complete) / 2
        assert destination.execute("qom-list", {"path": "/machine"}) == other
    with Keeper([memory]) as keeper, Destination.adopting(qemu, machine(accelerator), keeper) as destination:
        assert destination.execute("qom-list", {"path": cpu}) == complete


@EVERY_EMULATOR
def test_mapping_keeps_its_madvise_settings_after_adoption(
    qemu: Path, accelerator: Accelerator, memory: Memory, keeper: Keeper
) -> None:
    """madvise() settings (huge pages, not in core dumps, not for children) are there again after the hand-over."""
    command = machine(accelerator, backend=",dump=off,merge=on")
    with Destination([qemu, *command], dict(os.environ)) as plain:
        lines = [line.split() for line in Path(f"/proc/{plain.pid}/maps").read_text().splitlines()]
        inode = next(int(words[4]) for words in lines if f"/memfd:{BACKEND}" in words)
        expected = plain.mapping_flags(inode)
    with Destination.adopting(qemu, command, keeper) as destination:
        destination.adopt_ram()
        flags = destination.mapping_flags(memory.inode)
    assert "dd" in flags
    # sd: pages were written, which is no setting
    assert flags - {"sd"} == expected - {"sd"}


def test_several_backends_are_identified_by_order(qemu: Path, accelerator: Accelerator) -> None:
    half = RAM // 2
    numa = [
        *["-smp", "2", "-object", f"memory-backend-memfd,id=ram1,size={half >> 20}M,share=on,seal=off"],
        *["-numa", "node,nodeid=0,cpus=0,memdev=ram0", "-numa", "node,nodeid=1,cpus=1,memdev=ram1"],
    ]
    command = [
        *["-nodefaults", "-no-user-config", "-display", "none", "-accel", accelerator, "-S", "-incoming", "defer"],
        *["-machine", "q35", "-m", f"{RAM >> 20}M"],
        *["-object", f"memory-backend-memfd,id=ram0,size={half >> 20}M,share=on", *numa],
    ]
    with (
        Memory(half) as first,
        Memory(half, seal=False) as second,
        Keeper([first, second]) as keeper,
        Destination.adopting(qemu, command, keeper) as destination,
    ):
        assert destination.adopt_ram() == adopt.AdoptedRam(mappings=2, size=RAM)
        assert [memfd.inode for memfd in destination.status().memfds] == [first.inode, second.inode]
        assert inspect(destination, 0x8000) == int.from_bytes(first.read(0x8000, 8), "little")
        assert inspect(destination, half + 0x8000) == int.from_bytes(second.read(0x8000, 8), "little")


def test_every_memory_block_is_adopted_with_aux_ram_share(
    emulator: Callable[[str], Path], accelerator: Accelerator, memory: Memory
) -> None:
    """Such blocks are created with size 0 and sized later: the guest's must not be cut on the way."""
    command = machine(accelerator, "-machine", "aux-ram-share=on", "-device", "VGA")
    with Memory(16 << 20, seal=False) as video:

        class Both(Keeper):
            def answer(self, request: str) -> tuple[bytes, int | None]:
                if request.startswith("memfd 0 ") and request.endswith("/vga.vram"):
                    self.requests.append(request)
                    return f"fd {video.size}".encode(), video.fd
                return super().answer(request)

        before = video.digest()
        with (
            Both([memory]) as keeper,
            Destination.adopting(emulator(emulators.NEW), command, keeper) as destination,
        ):
            assert any(request.endswith("pc.rom") for request in keeper.requests)
            assert len(destination.status().memfds) == 2
            assert video.digest() == before
            assert destination.adopt_ram() == adopt.AdoptedRam(mappings=2, size=RAM + video.size)
            assert video.digest() == before


def test_memory_is_locked_only_when_the_hop_is_over(qemu: Path, accelerator: Accelerator, keeper: Keeper) -> None:
    def locked() -> int:
        status = Path(f"/proc/{destination.pid}/status").read_text()
        return int(re.findall(r"VmLck:\s+(\d+) kB", status)[0]) << 10

    command = machine(accelerator, "-overcommit", "mem-lock=on")
    with Destination.adopting(qemu, command, keeper) as destination:
        destination.adopt_ram()
        assert locked() == 0
        destination.finish()
        wait_until(lambda: locked() >= RAM, 10, "memory is locked")


@EVERY_EMULATOR
def test_memory_of_another_size_is_refused(
    qemu: Path, accelerator: Accelerator, keeper: Keeper, memory: Memory
) -> None:
    before = memory.digest()
    line = refused(qemu, machine(accelerator, size=2 * RAM), keeper)
    assert line == (
        f"guest memory '{BACKEND}' has {RAM} bytes in the old QEMU and {2 * RAM} here: "
        "use the same -m and memory backends"
    )
    assert memory.digest() == before


def test_private_memory_is_refused(qemu: Path, accelerator: Accelerator, keeper: Keeper) -> None:
    line = refused(qemu, machine(accelerator, backend=",share=off"), keeper)
    assert line == f"guest memory '{BACKEND}' is to be private here: it needs share=on"


def test_backends_that_the_source_lacks_are_refused(qemu: Path, accelerator: Accelerator, keeper: Keeper) -> None:
    line = refused(
        qemu,
        machine(accelerator, "-object", "memory-backend-memfd,id=more,size=2M,share=on"),
        keeper,
    )
    assert line == "the old QEMU has fewer memory-backend-memfd objects: use the same memory backends"


def test_mapping_beyond_the_memory_is_refused(
    qemu: Path, accelerator: Accelerator, memory: Memory, keeper: Keeper, tmp_path: Path
) -> None:
    """A QEMU that has asked for the right size, and then takes more."""
    code = f"""
        #define _GNU_SOURCE
        #include <dlfcn.h>
        #include <sys/mman.h>

        void *mmap64(void *address, size_t length, int prot, int flags, int fd, off_t offset)
        {{
            void *(*next)(void *, size_t, int, int, int, off_t) = dlsym(RTLD_NEXT, "mmap64");

            return next(address, fd >= 0 && length == {RAM} ? 2 * length : length, prot, flags, fd, offset);
        }}
    """
    environment = preloaded(f"fd:{keeper.theirs.fileno()}")
    environment["LD_PRELOAD"] = f"{build(code, tmp_path / 'greedy.so')}:{environment['LD_PRELOAD']}"
    status, lines = fails_to_start(qemu, machine(accelerator), environment, [keeper.theirs.fileno()])
    line = f"guest memory '{BACKEND}' has {RAM} bytes in the old QEMU, and {2 * RAM} from 0 on are mapped here"
    assert (status, lines) == (1, [f"sevhop adopt: {line}"])


def test_keeper_is_refused_if_it_reports_a_wrong_size(qemu: Path, accelerator: Accelerator, memory: Memory) -> None:
    lie = Memory()
    lie.size = RAM * 2
    with lie, Keeper([lie]) as keeper:
        line = refused(qemu, machine(accelerator, size=2 * RAM), keeper)
    assert line == f"guest memory '{BACKEND}' has {RAM} bytes, the keeper reports {2 * RAM}"


def test_keeper_is_refused_if_it_sends_the_same_memory_twice(
    qemu: Path, accelerator: Accelerator, memory: Memory
) -> None:
    with Keeper([memory, memory]) as keeper:
        more = machine(accelerator, "-object", f"memory-backend-memfd,id=more,size={RAM >> 20}M,share=on")
        assert refused(qemu, more, keeper) == f"invalid reply of the keeper: the same guest memory '{BACKEND}' twice"


# ---- the keeper ----


@EVERY_EMULATOR
def test_destination_exits_if_the_keeper_is_missing(qemu: Path, accelerator: Accelerator, tmp_path: Path) -> None:
    path = tmp_path / "keeper"
    status, lines = fails_to_start(qemu, machine(accelerator), preloaded(str(path)))
    assert (status, lines) == (
        1,
        [f"sevhop adopt: cannot connect to the keeper at {path}: No such file or directory"],
    )


@EVERY_EMULATOR
def test_destination_exits_if_the_keeper_replies_an_error(qemu: Path, accelerator: Accelerator) -> None:
    with Keeper(override=lambda request: b"error the guest is elsewhere") as keeper:
        assert refused(qemu, machine(accelerator), keeper) == "cannot connect to the keeper: the guest is elsewhere"


@pytest.mark.parametrize(
    ("hello", "line"),
    [
        (b"what", "invalid reply of the keeper: what"),
        (b"ok context=odd source=running", "invalid reply of the keeper: ok context=odd source=running"),
        (b"ok context=none", "invalid reply of the keeper: ok context=none"),
        (b"ok source=ended", "invalid reply of the keeper: ok source=ended"),
        (
            b"ok context=sev source=ended measurement=5e",
            "invalid reply of the keeper: ok context=sev source=ended measurement=5e",
        ),
        (
            b"ok context=sev source=ended handle=-1",
            "invalid reply of the keeper: ok context=sev source=ended handle=-1",
        ),
        (b"x" * 5000, "the keeper does not answer: Protocol error"),
        (b"", "the keeper does not answer: Connection reset by peer"),
    ],
)
def test_destination_exits_after_an_invalid_hello(
    qemu: Path, accelerator: Accelerator, hello: bytes, line: str
) -> None:
    with Keeper(override=lambda request: hello) as keeper:
        assert refused(qemu, machine(accelerator), keeper) == line


def test_destination_exits_if_a_reply_lacks_its_descriptor(qemu: Path, accelerator: Accelerator) -> None:
    def no_descriptor(request: str) -> bytes | None:
        return b"fd 1000" if request.startswith("memfd") else None

    with Keeper(override=no_descriptor) as keeper:
        assert (
            refused(qemu, machine(accelerator), keeper) == f"invalid reply of the keeper about guest memory '{BACKEND}'"
        )


def test_destination_exits_if_the_keeper_hangs_up(qemu: Path, accelerator: Accelerator) -> None:
    def hang_up(request: str) -> bytes | None:
        return b"" if request.startswith("memfd") else None

    with Keeper(override=hang_up) as keeper:
        assert refused(qemu, machine(accelerator), keeper) == "the keeper does not answer: Connection reset by peer"


def test_destination_exits_if_the_keeper_does_not_answer(qemu: Path, accelerator: Accelerator) -> None:
    over = threading.Event()

    def hang(request: str) -> bytes | None:
        over.wait()
        return b"none"

    with Keeper(override=hang) as keeper:
        try:
            assert refused(qemu, machine(accelerator), keeper) == "the keeper does not answer: timed out"
        finally:
            over.set()


def test_destination_exits_if_the_keeper_is_no_socket(qemu: Path, accelerator: Accelerator) -> None:
    with open(os.devnull) as file:
        fd = file.fileno()
        status, lines = fails_to_start(qemu, machine(accelerator), preloaded(f"fd:{fd}"), [fd])
    assert (status, lines) == (1, [f"sevhop adopt: SEVHOP_KEEPER is not an open socket: fd:{fd}"])


@contextlib.contextmanager
def keeper_at(path: Path, keeper: Keeper) -> Iterator[None]:
    """A keeper that listens at a path."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        serve(connection, keeper)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_keeper_is_found_at_a_path(qemu: Path, accelerator: Accelerator, memory: Memory, tmp_path: Path) -> None:
    path = tmp_path / "keeper"
    with (
        keeper_at(path, Keeper([memory])),
        Destination([qemu, *machine(accelerator)], preloaded(str(path))) as destination,
    ):
        assert destination.adopt_ram().mappings == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_keeper_of_another_user_is_refused(qemu: Path, accelerator: Accelerator, tmp_path: Path) -> None:
    """SO_PEERCRED returns the process that called listen()."""
    path = tmp_path / "keeper"
    nobody = 65534
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with listener:
        listener.bind(str(path))
        child = os.fork()
        if child == 0:
            os.setresuid(nobody, nobody, nobody)
            listener.listen()
            os._exit(0)
        os.waitpid(child, 0)
        status, lines = fails_to_start(qemu, machine(accelerator), preloaded(str(path)))
    assert status == 1
    assert lines == [f"sevhop adopt: the keeper at {path} belongs to user 65534, not to root or to this QEMU's user"]


# ---- the commands ----


@EVERY_EMULATOR
def test_move_needs_a_source(qemu: Path, kvm: Accelerator, keeper: Keeper) -> None:
    with Destination.adopting(qemu, machine(kvm), keeper) as destination:
        move = "x-sev-migrate-from"
        with pytest.raises(CommandError, match="Parameter 'fd' is missing"):
            destination.execute(move)
        with pytest.raises(CommandError, match="Invalid parameter type for 'fd', expected: string"):
            destination.execute(move, {"fd": 3})
        with pytest.raises(CommandError, match="Parameter is unexpected"):
            destination.execute(move, {"fd": "source", "more": True})
        with pytest.raises(CommandError, match="Guest memory is still private"):
            destination.execute(move, {"fd": "source"})
        destination.adopt_ram()
        with pytest.raises(CommandError, match="File descriptor named 'source' has not been found"):
            destination.execute(move, {"fd": "source"})
        with open(os.devnull) as file:
            result = destination.move_from(file.fileno())
        assert result == adopt.MoveResult(errno=9, name="EBADF", vcpus=0, registers=0, restore_errno=0)
        with pytest.raises(CommandError, match="File descriptor named 'source' has not been found"):
            destination.execute(move, {"fd": "source"})
        assert not destination.status().moved


@EVERY_EMULATOR
def test_move_returns_einval_for_a_guest_without_sev(qemu: Path, kvm: Accelerator, keeper: Keeper, vm: int) -> None:
    """The kernel's own answer, and the guest is none the worse."""
    with Destination.adopting(qemu, machine(kvm, incoming=False), keeper) as destination:
        destination.adopt_ram()
        assert destination.move_from(vm) == adopt.MoveResult(errno.EINVAL, "EINVAL", 0, 0, 0)
        assert not destination.status().moved
        destination.execute("cont")


def test_move_is_refused_without_kvm(qemu: Path, keeper: Keeper) -> None:
    with Destination.adopting(qemu, machine("tcg"), keeper) as destination:
        destination.adopt_ram()
        with open(os.devnull) as file, pytest.raises(CommandError, match="This QEMU has no KVM VM"):
            destination.move_from(file.fileno())


@EVERY_EMULATOR
def test_running_guest_is_not_touched(qemu: Path, kvm: Accelerator, keeper: Keeper) -> None:
    with Destination.adopting(qemu, machine(kvm, incoming=False), keeper) as destination:
        destination.adopt_ram()
        destination.execute("cont")
        assert destination.execute("query-status")["running"]
        with pytest.raises(CommandError, match="This VM is running"):
            destination.adopt_ram()
        with open(os.devnull) as file, pytest.raises(CommandError, match="This VM is running"):
            destination.move_from(file.fileno())


@pytest.mark.parametrize(
    "command", ["x-sev-adopt-ram", "x-sev-adopt-status", "x-sev-adopt-announce", "x-sev-adopt-finish"]
)
def test_adopt_commands_refuse_unknown_arguments(
    command: str, qemu: Path, accelerator: Accelerator, keeper: Keeper
) -> None:
    with (
        Destination.adopting(qemu, machine(accelerator), keeper) as destination,
        pytest.raises(CommandError, match="Parameter is unexpected"),
    ):
        destination.execute(command, {"surprise": 1})


def documented() -> dict[str, dict[str, Any]]:
    """The commands and structs of adopt.json, by name."""
    text = (ROOT / "qmp_ext" / "adopt" / "adopt.json").read_text()
    code = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    definitions = [ast.literal_eval(part) for part in code.strip().split("\n\n") if part.strip()]
    return {definition.get("command") or definition["struct"]: definition for definition in definitions}


def test_adopt_commands_match_their_schema(qemu: Path, kvm: Accelerator, keeper: Keeper, vm: int) -> None:
    schema = documented()
    types = {"int": int, "str": str, "bool": bool}
    with Destination.adopting(qemu, machine(kvm), keeper) as destination:
        assert {name for name in schema if name.startswith("x-")} == set(adopt_library.COMMANDS)
        for command in ("x-sev-adopt-ram", "x-sev-migrate-from", "x-sev-adopt-status"):
            arguments = None
            if command == "x-sev-migrate-from":
                destination.send_fd("source", vm)
                arguments = {"fd": "source"}
            answer = destination.execute(command, arguments)
            members = schema[schema[command]["returns"]]["data"]
            assert answer.keys() == members.keys()
            for name, kind in members.items():
                if isinstance(kind, str):
                    assert type(answer[name]) is types[kind], name
        memfd = destination.execute("x-sev-adopt-status")["memfds"][0]
        assert memfd.keys() == schema["AdoptedMemfd"]["data"].keys()
        assert destination.execute("x-sev-adopt-finish") == {}


# ---- the guard ----


@EVERY_EMULATOR
def test_keeper_is_notified_before_the_guest_runs(qemu: Path, accelerator: Accelerator, keeper: Keeper) -> None:
    """... and only if there is a stream: otherwise the caller has sent cont, and knows."""
    with (
        Destination.adopting(qemu, machine(accelerator, incoming=False), keeper) as destination,
        open(os.devnull) as file,
    ):
        destination.adopt_ram()
        destination.execute("cont")
        destination.execute("stop")
        assert "run" not in keeper.requests
        destination.adopt_ram_with(file.fileno(), 0)
        destination.execute("cont")
        wait_until(lambda: keeper.requests.count("run") == 1, TIMEOUT, "the keeper is notified")
        destination.execute("stop")
        destination.execute("cont")
        assert keeper.requests.count("run") == 1


@EVERY_EMULATOR
@pytest.mark.parametrize("hop", ["rolled back", "command killed"])
def test_destination_of_a_rolled_back_hop_does_not_run(
    hop: str, qemu: Path, accelerator: Accelerator, memory: Memory, run_mark: RunMark
) -> None:
    with contextlib.ExitStack() as resources:
        keeper = resources.enter_context(Keeper([memory], run_mark=run_mark))
        destination = resources.enter_context(Destination.adopting(qemu, machine(accelerator, incoming=False), keeper))
        file = resources.enter_context(open(os.devnull))
        destination.adopt_ram()
        destination.adopt_ram_with(file.fileno(), 0)
        keeper.revoke_start() if hop == "rolled back" else keeper.__exit__()
        with pytest.raises(MonitorError):
            destination.execute("cont")
        assert destination.exited() == (1, ["sevhop adopt: this QEMU must not run: the hop was interrupted"])
        assert "run" not in keeper.requests
        assert run_mark.read() is RunState.NOT


@EVERY_EMULATOR
@pytest.mark.parametrize("notified", [False, True])
def test_run_mark_outlives_the_destination(
    notified: bool, qemu: Path, accelerator: Accelerator, memory: Memory, run_mark: RunMark
) -> None:
    when_notified: list[RunState] = []

    def override(request: str) -> None:
        if request == "run":
            when_notified.append(run_mark.read())

    keeper = Keeper([memory], run_mark=run_mark, override=override)
    command = machine(accelerator, incoming=False)
    with keeper, Destination.adopting(qemu, command, keeper) as destination, open(os.devnull) as file:
        destination.adopt_ram()
        if notified:
            destination.adopt_ram_with(file.fileno(), 0)
        assert not destination.status().ran
        assert run_mark.read() is RunState.NOT
        destination.execute("cont")
        destination.execute("stop")
        assert destination.status().ran
        wait_until(lambda: len(when_notified) == notified, TIMEOUT, "the keeper is notified")
        destination.execute("quit")
        destination.exited()
    assert run_mark.read() is RunState.RAN
    assert RunState.NOT not in when_notified


def test_destination_does_not_run_without_leaving_its_mark(
    qemu: Path, accelerator: Accelerator, memory: Memory
) -> None:
    with open("/dev/zero", "rb") as unwritable, Keeper([memory]) as keeper:
        keeper.run_mark = RunMark(unwritable.fileno())
        with Destination.adopting(qemu, machine(accelerator, incoming=False), keeper) as destination:
            destination.adopt_ram()
            with pytest.raises(MonitorError):
                destination.execute("cont")
            assert destination.exited() == (
                1,
                ["sevhop adopt: this QEMU must not run: the run mark cannot be written"],
            )


@EVERY_EMULATOR
def test_boosted_vcpus_are_reset_before_the_guest_runs(qemu: Path, accelerator: Accelerator, keeper: Keeper) -> None:
    with Destination.adopting(qemu, machine(accelerator, incoming=False), keeper) as destination:
        destination.adopt_ram()
        threads = [int(name) for name in os.listdir(f"/proc/{destination.pid}/task")]
        assert len(threads) > 1
        with boosted(*threads):
            destination.execute("cont")
            others = [thread for thread in threads if thread != destination.pid]
            assert {os.sched_getscheduler(thread) for thread in others} == {os.SCHED_OTHER}


@EVERY_EMULATOR
def test_destination_does_not_run_on_copies(qemu: Path, accelerator: Accelerator, keeper: Keeper) -> None:
    with Destination.adopting(qemu, machine(accelerator, incoming=False), keeper) as destination:
        with pytest.raises(MonitorError):
            destination.execute("cont")
        assert destination.exited() == (
            1,
            ["sevhop adopt: this QEMU must not run: the guest's memory is still the old QEMU's"],
        )


def test_destination_does_not_run_at_start(qemu: Path, accelerator: Accelerator, keeper: Keeper) -> None:
    command = [word for word in machine(accelerator, incoming=False) if word != "-S"]
    assert refused(qemu, command, keeper) == "this QEMU must not run: the guest's memory is still the old QEMU's"


def test_destination_does_not_run_on_memory_of_its_own(qemu: Path, accelerator: Accelerator, keeper: Keeper) -> None:
    command = ["-nodefaults", "-display", "none", "-accel", accelerator, "-machine", "q35", "-m", "64M"]
    assert refused(qemu, command, keeper) == "this QEMU must not run: no guest memory was adopted"


def test_hop_is_not_over_before_memory_is_adopted(qemu: Path, accelerator: Accelerator, keeper: Keeper) -> None:
    with Destination.adopting(qemu, machine(accelerator), keeper) as destination:
        with pytest.raises(CommandError, match="The hop is not over: the guest's memory is still the old QEMU's"):
            destination.finish()
        destination.adopt_ram()
        destination.finish()
        destination.finish()
        assert destination.status().finished


# ---- sockets ----


def greeted(client: socket.socket, timeout: float) -> bool:
    """Whether a monitor has greeted."""
    client.settimeout(timeout)
    try:
        return client.recv(4096).startswith(b'{"QMP"')
    except TimeoutError:
        return False


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used: fields 14 and 15 of /proc/PID/stat."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@EVERY_EMULATOR
def test_listening_sockets_are_taken_over(qemu: Path, accelerator: Accelerator, memory: Memory, tmp_path: Path) -> None:
    path = tmp_path / "monitor"
    with contextlib.ExitStack() as stack:
        local = stack.enter_context(socket.socket(socket.AF_UNIX))
        local.bind(str(path))
        local.listen()
        network = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = network.getsockname()[1]
        inode = path.lstat().st_ino
        command = machine(
            accelerator,
            *["-qmp", f"unix:{path},server=on,wait=off", "-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off"],
            *["-qmp", f"unix:{tmp_path}/another,server=on,wait=off"],
        )
        keeper = stack.enter_context(Keeper([memory], [local, network]))
        destination = stack.enter_context(Destination.adopting(qemu, command, keeper))
        assert destination.status().listeners == 2
        assert path.lstat().st_ino == inode, "the source's path was replaced"
        asked = [request for request in keeper.requests if request.startswith("listener")]
        assert asked.count(f"listener {sockaddr(local).hex()}") == 1, "unlink and bind ask once"

        # Clients are the source's until the hop is over. One that comes now is not lost.
        early = [stack.enter_context(socket.socket(socket.AF_UNIX)), stack.enter_context(socket.socket())]
        early[0].connect(str(path))
        early[1].connect(("127.0.0.1", port))
        before = cpu_seconds(destination.pid)
        assert not any(greeted(client, 0.25) for client in early)
        assert cpu_seconds(destination.pid) - before < 0.25, "QEMU polls the clients all the time"
        # One of its own is served at once.
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{tmp_path}/another")
            assert greeted(client, 10)

        # A client sees the process that serves: the last one that has called listen(), unix(7).
        assert peer_credentials(early[0])[0] == os.getpid()

        destination.adopt_ram()
        destination.finish()
        assert all(greeted(client, 10) for client in early)
        early[0].close()
        with socket.socket(socket.AF_UNIX) as late:
            late.connect(str(path))
            assert peer_credentials(late)[0] == destination.pid


def test_paths_of_the_source_stay_when_the_destination_exits(
    qemu: Path, accelerator: Accelerator, memory: Memory, tmp_path: Path
) -> None:
    path, own = tmp_path / "monitor", tmp_path / "own"
    with socket.socket(socket.AF_UNIX) as local:
        local.bind(str(path))
        local.listen()
        command = machine(
            accelerator,
            *["-qmp", f"unix:{path},server=on,wait=off", "-qmp", f"unix:{own},server=on,wait=off"],
        )
        with (
            Keeper([memory], [local]) as keeper,
            Destination.adopting(qemu, command, keeper) as destination,
        ):
            assert own.is_socket()
            destination.execute("quit")
            assert destination.exited()[0] == 0
        assert path.is_socket()
        assert not own.exists()


def test_socket_that_does_not_listen_is_refused(
    qemu: Path, accelerator: Accelerator, memory: Memory, tmp_path: Path
) -> None:
    path = tmp_path / "monitor"
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(path))
        with Keeper([memory], [deaf]) as keeper:
            line = refused(qemu, machine(accelerator, "-qmp", f"unix:{path},server=on,wait=off"), keeper)
    assert line == "invalid reply of the keeper: the descriptor is not a listening socket"


# ---- files, environment, processes ----


@EVERY_EMULATOR
def test_logs_of_the_source_are_appended_to(
    qemu: Path, accelerator: Accelerator, keeper: Keeper, tmp_path: Path
) -> None:
    serial, console, trace, fresh = (tmp_path / name for name in ("serial", "console", "trace", "fresh"))
    for log in (serial, console, trace):
        log.write_text("the source was here\n")
    command = machine(
        accelerator,
        *["-serial", f"file:{serial}", "-D", str(trace), "-d", "unimp"],
        *["-chardev", f"null,id=console,logfile={console}", "-serial", "chardev:console", "-serial", f"file:{fresh}"],
    )
    with Destination.adopting(qemu, command, keeper) as destination:
        assert fresh.exists()
        with open(serial, "a") as source:
            source.write("and is still here\n")
        assert serial.read_text() == "the source was here\nand is still here\n"
        assert console.read_text() == trace.read_text() == "the source was here\n"
        opened = {
            os.readlink(entry.path): Path(f"/proc/{destination.pid}/fdinfo/{entry.name}").read_text()
            for entry in os.scandir(f"/proc/{destination.pid}/fd")
        }
        flags = {name: int(re.findall(r"flags:\s+(\d+)", text)[0], 8) for name, text in opened.items()}
        assert flags[str(serial)] & os.O_APPEND
        assert not flags[str(fresh)] & os.O_APPEND


def test_stderr_of_the_source_is_handed_over(
    qemu: Path, accelerator: Accelerator, keeper: Keeper, tmp_path: Path
) -> None:
    with open(tmp_path / "messages", "wb") as messages:
        fd = messages.fileno()
        with Destination(
            [qemu, *machine(accelerator)],
            preloaded(f"fd:{keeper.theirs.fileno()}", fd),
            [keeper.theirs.fileno(), fd],
        ) as destination:
            table = Path(f"/proc/{destination.pid}/fd")
            assert os.readlink(table / "2").startswith("pipe:")
            destination.adopt_ram()
            destination.finish()
            assert os.readlink(table / "2") == messages.name
            assert not (table / str(fd)).exists()


def test_stderr_that_is_not_open_is_refused(qemu: Path, accelerator: Accelerator, keeper: Keeper) -> None:
    environment = preloaded(f"fd:{keeper.theirs.fileno()}", 999)
    status, lines = fails_to_start(qemu, machine(accelerator), environment, [keeper.theirs.fileno()])
    assert (status, lines) == (1, ["sevhop adopt: SEVHOP_STDERR is not an open descriptor: 999"])


@EVERY_EMULATOR
def test_children_inherit_neither_environment_nor_descriptors(
    qemu: Path, accelerator: Accelerator, keeper: Keeper, tmp_path: Path
) -> None:
    seen = tmp_path / "environment"
    with Destination.adopting(qemu, machine(accelerator), keeper) as destination:
        # The child prints what it has, and then exits without a stream.
        script = f"env > {seen}.new; ls -l /proc/self/fd >> {seen}.new; mv {seen}.new {seen}"
        destination.execute("migrate-incoming", {"uri": f"exec:{script}"})
        wait_until(seen.exists, 10, "the child has run")
    assert "PATH=" in seen.read_text()
    assert not re.findall(r"LD_PRELOAD|SEVHOP|memfd", seen.read_text())


def test_other_preloaded_libraries_stay(qemu: Path, accelerator: Accelerator, keeper: Keeper, tmp_path: Path) -> None:
    other = build("int sevhop_test_of_something_else;", tmp_path / "other.so")
    seen = tmp_path / "environment"
    with Destination.adopting(qemu, machine(accelerator), keeper, more=str(other)) as destination:
        destination.execute("migrate-incoming", {"uri": f"exec:env > {seen}.new; mv {seen}.new {seen}"})
        wait_until(seen.exists, 10, "the child has run")
    assert f"LD_PRELOAD={other}\n" in seen.read_text()


@EVERY_EMULATOR
def test_wrapper_script_starts_an_adopting_destination(
    qemu: Path, accelerator: Accelerator, memory: Memory, keeper: Keeper, tmp_path: Path
) -> None:
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(f'#!/bin/sh\nset -e\ntest -n "$(uname)"\n{qemu} --version >/dev/null\nexec {qemu} "$@"\n')
    wrapper.chmod(0o700)
    with Destination.adopting(wrapper, machine(accelerator), keeper) as destination:
        assert destination.adopt_ram().mappings == 1
        assert destination.mapping(memory) == ["rw-s"]


def test_destination_adopts_memory_in_a_sandbox(qemu: Path, accelerator: Accelerator, keeper: Keeper) -> None:
    """libvirt's default."""
    sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    with Destination.adopting(qemu, machine(accelerator, "-sandbox", sandbox), keeper) as destination:
        destination.adopt_ram()
        destination.finish()


# ---- SEV, with a kernel that plays it ----

#: What a source's keeper reports of it.
MEASUREMENT = bytes(range(48))
FACTS = f" handle=7 measurement={MEASUREMENT.hex()}"


@pytest.fixture
def kernel_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What the fake kernel has accepted."""
    log = tmp_path / "kernel"
    monkeypatch.setenv("FAKE_SEV_LOG", str(log))
    return lambda: log.read_text().splitlines() if log.exists() else []


@EVERY_EMULATOR
def test_sev_guest_is_adopted(
    qemu: Path,
    kvm: Accelerator,
    memory: Memory,
    vm: int,
    fake_kernel: str,
    c_bit: int,
    kernel_log: Callable[[], list[str]],
) -> None:
    command = machine(kvm, *sev_guest(c_bit), "-smp", "2", incoming=False)
    with (
        Keeper([memory], context="sev", more=FACTS) as keeper,
        Destination.adopting(qemu, command, keeper, fake_kernel) as destination,
    ):
        status = destination.status()
        assert (status.context, status.moved, status.vcpus, status.vm_type) == ("sev", False, 2, 0)
        assert status.emulated_launch_commands >= 3, "INIT, LAUNCH_START, LAUNCH_MEASURE"
        assert status.deferred_regions >= 1
        assert kernel_log() == []
        measured = destination.execute("query-sev-launch-measure")["data"]
        assert base64.b64decode(measured) == MEASUREMENT

        with pytest.raises(CommandError, match="Guest memory is still private"):
            destination.move_from(vm)
        destination.adopt_ram()
        with pytest.raises(CommandError, match="the guest's SEV context is still the old QEMU's"):
            destination.finish()
        assert destination.move_from(vm) == adopt.MoveResult(0, "OK", vcpus=2, registers=0, restore_errno=0)
        assert kernel_log() == ["moved", "cpuid", "cpuid"]
        assert os.readlink(f"/proc/{destination.pid}/fd/0") == "/dev/zero", "the fake's /dev/sev is descriptor 0"
        with pytest.raises(CommandError, match="A context has been moved into this VM already"):
            destination.move_from(vm)

        destination.execute("cont")
        sev = destination.execute("query-sev")
        assert (sev["enabled"], sev["state"], sev["policy"], sev["handle"]) == (True, "running", 1, 7)
        destination.finish()
        assert destination.status().moved


#: The firmware of an SEV-ES guest: QEMU looks in it for the reset vector of the vCPUs.
FIRMWARE = ("-drive", f"if=pflash,format=raw,readonly=on,file={OVMF_CODE}")
NEEDS_FIRMWARE = pytest.mark.skipif(not OVMF_CODE.exists(), reason="OVMF is not installed")
#: include/uapi/linux/kvm.h
RUNNABLE, HALTED = 0, 3


@NEEDS_FIRMWARE
@EVERY_EMULATOR
def test_sev_es_guest_is_adopted(
    qemu: Path, kvm: Accelerator, memory: Memory, vm: int, fake_kernel: str, c_bit: int
) -> None:
    """QEMU accesses vCPU state until the hop is over, whatever it believes of a guest whose registers are encrypted."""
    command = machine(kvm, *sev_guest(c_bit, "sev-es"), *FIRMWARE, "-smp", "2")
    with (
        Keeper([memory], context="sev-es") as keeper,
        Destination.adopting(qemu, command, keeper, fake_kernel) as destination,
    ):
        status = destination.status()
        assert status.context == "sev-es"
        process = QemuProcess.open(destination.pid)
        assert bool(status.protected_state_offset) == has_flag(process, destination.monitor.version)
        destination.adopt_ram()
        assert destination.move_from(vm).errno == 0
        with contextlib.ExitStack() as stack:
            stack.callback(process.close)
            if status.protected_state_offset:
                flag = stack.enter_context(ProtectedState(process, status.protected_state_offset))
                assert flag.protected() == 0
            destination.execute("cont")
            destination.finish()
            if status.protected_state_offset:
                assert flag.protected() == 1


def save_state(qemu: Path, arguments: list[str], fake_kernel: str, state: Path, **vcpus: int) -> None:
    """
    Save the device state of a machine.

    :param vcpus: what the fake kernel reports of its vCPUs.
    """
    environment = {**os.environ, "LD_PRELOAD": fake_kernel, **{name: str(value) for name, value in vcpus.items()}}
    with Destination([qemu, *arguments], environment) as source:
        source.execute("xen-save-devices-state", {"filename": str(state)})


def load_state(destination: Destination, state: Path) -> None:
    destination.execute("migrate-incoming", {"uri": f"exec:cat {state}"})
    wait_until(lambda: destination.execute("query-migrate").get("status") == "completed", 20, "the state is loaded")


@NEEDS_FIRMWARE
@EVERY_EMULATOR
@pytest.mark.parametrize(("context", "set_to"), [("sev", HALTED), ("sev-es", RUNNABLE)])
def test_vcpu_state_that_is_not_encrypted_reaches_the_kernel(
    context: str,
    set_to: int,
    qemu: Path,
    kvm: Accelerator,
    memory: Memory,
    fake_kernel: str,
    c_bit: int,
    tmp_path: Path,
    kernel_log: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The local APIC, and the MP state; but no vCPU of an SEV-ES guest is halted: it would not wake up."""
    state = tmp_path / "state"
    more = [*FIRMWARE, "-smp", "2", "-global", "migration.send-configuration=off"]
    save_state(qemu, machine(kvm, *more, incoming=False), fake_kernel, state, FAKE_SEV_MP_STATE=HALTED)
    monkeypatch.setenv("FAKE_SEV_STATE", "1")
    with (
        Keeper([memory], context=context, more=FACTS) as keeper,
        Destination.adopting(qemu, machine(kvm, *more, *sev_guest(c_bit, context)), keeper, fake_kernel) as destination,
    ):
        destination.adopt_ram()
        before = len(kernel_log())
        load_state(destination, state)
        loaded = kernel_log()[before:]
        assert loaded.count("local APIC") >= 2
        assert [line for line in loaded if line.startswith("mp state")] == [f"mp state {set_to}"] * 2


@NEEDS_FIRMWARE
@EVERY_EMULATOR
@pytest.mark.parametrize(("context", "before_move"), [("sev", "masked"), ("sev-es", "not masked")])
def test_vcpu_that_handles_an_nmi_masks_others_after_the_move(
    context: str,
    before_move: str,
    qemu: Path,
    kvm: Accelerator,
    memory: Memory,
    vm: int,
    fake_kernel: str,
    c_bit: int,
    tmp_path: Path,
    kernel_log: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before it, KVM would intercept the IRET of an SEV-ES guest for good."""
    state = tmp_path / "state"
    more = [*FIRMWARE, "-global", "migration.send-configuration=off"]
    save_state(qemu, machine(kvm, *more, incoming=False), fake_kernel, state, FAKE_SEV_NMI=1)
    monkeypatch.setenv("FAKE_SEV_EVENTS", "1")
    with (
        Keeper([memory], context=context, more=FACTS) as keeper,
        Destination.adopting(qemu, machine(kvm, *more, *sev_guest(c_bit, context)), keeper, fake_kernel) as destination,
    ):
        destination.adopt_ram()
        before = len(kernel_log())
        load_state(destination, state)
        destination.hmp("info registers")  # QEMU reads them, and later sets what it has read
        assert destination.move_from(vm).restore_errno == 0
        log = kernel_log()[before:]
        moved = log.index("moved")
        assert {line for line in log[:moved] if "masked" in line} == {f"NMIs {before_move}"}
        assert [line for line in log if "masked" in line][-1] == "NMIs masked"
        destination.execute("cont")
        resumed = [line for line in kernel_log()[before + len(log) :] if "masked" in line]
        assert resumed[:1] in ([], ["NMIs masked"])  # the guest runs, and may end its handler


@EVERY_EMULATOR
def test_registers_that_the_kernel_refuses_end_the_destination(
    qemu: Path,
    kvm: Accelerator,
    memory: Memory,
    fake_kernel: str,
    c_bit: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the move, so that the hop is rolled back: not every QEMU reports it, and the rest would be skipped."""
    other_bit = 40 if c_bit != 40 else 41
    state = tmp_path / "state"
    more = ["-global", "migration.send-configuration=off"]
    cr3 = 0x5000 | 1 << other_bit
    save_state(qemu, machine(kvm, *more, incoming=False), fake_kernel, state, FAKE_SEV_CR3=cr3)
    monkeypatch.setenv("FAKE_SEV_BIT", str(other_bit))
    with (
        Keeper([memory], context="sev", more=FACTS) as keeper,
        Destination.adopting(qemu, machine(kvm, *more, *sev_guest(c_bit)), keeper, fake_kernel) as destination,
    ):
        destination.adopt_ram()
        destination.execute("migrate-incoming", {"uri": f"exec:cat {state}"})
        status, lines = destination.exited()
        assert status == 1
        assert any("the kernel refuses vCPU registers: Invalid argument (cr0 " in line for line in lines), lines


@EVERY_EMULATOR
def test_encrypted_page_tables_survive_the_hop(
    qemu: Path,
    kvm: Accelerator,
    memory: Memory,
    vm: int,
    fake_kernel: str,
    c_bit: int,
    tmp_path: Path,
    kernel_log: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CR3 with the C-bit is loaded before the move and set after it, although the kernel refuses it until then."""
    cr3 = 0x5000 | 1 << c_bit
    state = tmp_path / "state"
    more = ["-smp", "2", "-global", "migration.send-configuration=off"]
    save_state(qemu, machine(kvm, *more, incoming=False), fake_kernel, state, FAKE_SEV_CR3=cr3)
    monkeypatch.setenv("FAKE_SEV_BIT", str(c_bit))
    with (
        Keeper([memory], context="sev", more=FACTS) as keeper,
        Destination.adopting(qemu, machine(kvm, *more, *sev_guest(c_bit)), keeper, fake_kernel) as destination,
    ):
        destination.adopt_ram()
        load_state(destination, state)
        assert destination.status().deferred_registers == 2
        # A query makes QEMU read the registers, and later set what it has read.
        assert re.search(f"CR3=0*{cr3:x} ", destination.hmp("info registers"))
        assert destination.move_from(vm) == adopt.MoveResult(0, "OK", vcpus=2, registers=2, restore_errno=0)
        assert destination.status().deferred_registers == 0
        register = f"registers with cr3 {cr3:x}"
        assert kernel_log()[:5] == ["moved", "cpuid", "cpuid", register, register]
        # QEMU sets them once more, before the vCPUs run.
        destination.execute("cont")
        assert set(kernel_log()[5:]) <= {register}


def test_destination_does_not_run_after_a_refused_move(
    qemu: Path,
    kvm: Accelerator,
    memory: Memory,
    vm: int,
    fake_kernel: str,
    c_bit: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_SEV_MOVE_ERRNO", str(errno.EBUSY))
    with (
        Keeper([memory], context="sev", more=FACTS) as keeper,
        Destination.adopting(qemu, machine(kvm, *sev_guest(c_bit), incoming=False), keeper, fake_kernel) as destination,
    ):
        destination.adopt_ram()
        busy = adopt.MoveResult(errno.EBUSY, "EBUSY", 0, 0, 0)
        assert destination.move_from(vm) == busy
        assert destination.move_from(vm) == busy
        with pytest.raises(MonitorError):
            destination.execute("cont")
        assert destination.exited() == (
            1,
            ["sevhop adopt: this QEMU must not run: the guest's SEV context is still the old QEMU's"],
        )


@EVERY_EMULATOR
def test_plugged_memory_is_registered_once_there_is_a_context(
    qemu: Path,
    kvm: Accelerator,
    memory: Memory,
    vm: int,
    fake_kernel: str,
    c_bit: int,
    kernel_log: Callable[[], list[str]],
) -> None:
    """Memory is registered with the kernel for real once there is a context; what was only answered may go."""

    def add(name: str) -> None:
        destination.execute("object-add", {"qom-type": "memory-backend-ram", "id": name, "size": 1 << 20})

    with (
        Keeper([memory], context="sev", more=FACTS) as keeper,
        Destination.adopting(qemu, machine(kvm, *sev_guest(c_bit)), keeper, fake_kernel) as destination,
    ):
        regions = destination.status().deferred_regions
        for name in ("first", "second"):
            add(name)
        assert destination.status().deferred_regions == regions + 2
        destination.execute("object-del", {"id": "first"})
        assert destination.status().deferred_regions == regions + 1
        destination.adopt_ram()
        assert destination.move_from(vm).errno == 0
        add("third")
        assert kernel_log()[-1] == "region registered"
        destination.execute("object-del", {"id": "second"})
        assert kernel_log()[-1] == "region unknown"
        assert destination.status().deferred_regions == regions
        destination.execute("quit")
        status, lines = destination.exited()
        assert (status, lines) == (0, [])


@pytest.mark.parametrize(
    ("context", "guest", "line"),
    [
        ("sev", None, "the old QEMU runs a guest of context sev, this QEMU none: use the same sev-guest object"),
        (
            "sev-es",
            "sev",
            "this QEMU starts a guest of context sev, the old QEMU's is sev-es: use the same sev-guest object",
        ),
        (
            "none",
            "sev",
            "this QEMU starts a guest of context sev, the old QEMU's is none: use the same sev-guest object",
        ),
    ],
)
def test_context_other_than_the_sources_is_refused(
    context: str,
    guest: str | None,
    line: str,
    qemu: Path,
    kvm: Accelerator,
    memory: Memory,
    fake_kernel: str,
    c_bit: int,
) -> None:
    command = machine(kvm, *(sev_guest(c_bit, guest) if guest else []))
    with Keeper([memory], context=context) as keeper:
        assert refused(qemu, command, keeper, fake_kernel) == line


@pytest.mark.parametrize(("context", "number", "name"), [("sev", 2, "SEV"), ("sev-es", 3, "SEV-ES")])
def test_vm_of_a_sev_type_is_refused(
    context: str,
    number: int,
    name: str,
    emulator: Callable[[str], Path],
    kvm: Accelerator,
    memory: Memory,
    fake_kernel: str,
    c_bit: int,
) -> None:
    """It would take the context and never run it."""
    command = machine(kvm, *sev_guest(c_bit, context, ",legacy-vm-type=off"))
    with Keeper([memory], context=context) as keeper:
        assert refused(emulator(emulators.NEW), command, keeper, fake_kernel) == (
            f"this QEMU creates a VM of type {number}, {name} (KVM_SEV_INIT2), "
            "which cannot run a guest that was moved into it: use legacy-vm-type=on"
        )
