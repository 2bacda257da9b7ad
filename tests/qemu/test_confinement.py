"""
The new QEMU has the confinement and the scheduling of the old one, or the hop is refused and nothing is touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sevhop.engine.hop import Hop
from sevhop.errors import Refused, RolledBack
from sevhop.guest import preload
from sevhop.process import launch
from sevhop.process.confinement import Confinement
from sevhop.process.scheduling import Thread
from sevhop_qmp import adopt_library
from sevhop_qmp.process import QemuProcess

from tests.support.guests.machine import Machine
from tests.support.guests.running import Guest, processes_of, wait_until

from .conftest import DescribeCounter, DescribeLinux, StartGuest
from .hops import HopDriver, assert_unharmed, hop, sevhop
from .interrupted import interrupt_hop, recover
from .launched import Launched, shell, user

NOBODY = 65534
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs to become other users, and to change cgroups")


def confinement(pid: int) -> Confinement:
    process = QemuProcess.open(pid)
    try:
        return Confinement.of(process)
    finally:
        process.close()


def oom_score_adj(pid: int) -> str:
    return Path(f"/proc/{pid}/oom_score_adj").read_text().strip()


def threads(guest: Guest) -> dict[str, int]:
    """Role → id of the threads whose role is known."""
    return (
        {"first": guest.pid}
        | {f"vCPU {one['cpu-index']}": one["thread-id"] for one in guest.execute("query-cpus-fast")}
        | {f"iothread {one['id']}": one["thread-id"] for one in guest.execute("query-iothreads")}
    )


def assert_refused(guest: Guest, emulator: Path, reason: str) -> None:
    pid = guest.pid
    with pytest.raises(Refused, match=reason):
        HopDriver().run(guest, emulator)
    assert guest.pid == pid
    assert processes_of(guest.machine.directory) == [pid]
    assert_unharmed(guest)


# -- given to the destination ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "by",
    [
        pytest.param(("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"), id="no-capabilities"),
        pytest.param(("setpriv", "--bounding-set=-sys_admin,-sys_rawio"), id="fewer-capabilities"),
        pytest.param((*user(NOBODY), "--bounding-set=-all", "--no-new-privs"), id="user"),
        pytest.param(
            (*user(NOBODY), "--inh-caps=+net_admin,+sys_nice", "--ambient-caps=+net_admin"), id="user-with-capability"
        ),
        pytest.param(("setpriv", "--reuid=65534", "--regid=65534", "--groups=7,12"), id="groups"),
        pytest.param(
            shell("ulimit -f 2000000; ulimit -c 1000; ulimit -S -n 900; ulimit -n 1000; umask 077"), id="limits"
        ),
        pytest.param(("setarch", "--addr-no-randomize"), id="personality"),
        pytest.param(shell("echo 0x1 >/proc/self/coredump_filter"), id="core-dump-filter"),
    ],
)
def test_destination_is_confined_as_the_source_is(
    by: tuple[str, ...], old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest, open_directory: Path
) -> None:
    uid = NOBODY if any("65534" in argument for argument in by) else 0
    os.chown(open_directory, uid, uid)
    machine = counter_machine(accelerator="tcg", more=("-sandbox", "on"))
    guest = start(Launched.like(Machine(**{**vars(machine), "directory": open_directory}), *by), old)
    guest.wait_for_ticks(3)
    before = confinement(guest.pid)
    assert before.seccomp == 2
    assert hop(guest, new).source_pid != guest.pid
    after = confinement(guest.pid)
    for emulator in (old, new):  # and it is kept by more hops
        hop(guest, emulator)
    # A newer QEMU raises its soft limit of open files.
    assert _but_soft_files(after) == _but_soft_files(confinement(guest.pid)) == _but_soft_files(before)
    assert_unharmed(guest)


def _but_soft_files(found: Confinement) -> dict[str, object]:
    limits = [(number, hard if number == 7 else soft, hard) for number, soft, hard in found.limits]
    return found._asdict() | {"limits": limits}


def test_threads_are_scheduled_as_those_of_the_source_are(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    by = ("nice", "-n", "5", "ionice", "--class", "2", "--classdata", "6", "taskset", "--cpu-list", "0")
    machine = counter_machine(cpus=2, more=("-object", "iothread,id=io"))
    guest = start(Launched.like(machine, *by, *shell("echo 300 >/proc/self/oom_score_adj")), old)
    guest.wait_for_ticks(3)
    source = threads(guest)
    os.sched_setaffinity(source["vCPU 1"], {os.cpu_count() - 1})  # type: ignore[operator]
    os.sched_setscheduler(source["vCPU 0"], os.SCHED_BATCH, os.sched_param(0))
    os.sched_setscheduler(source["iothread io"], os.SCHED_FIFO, os.sched_param(7))
    os.setpriority(os.PRIO_PROCESS, source["vCPU 1"], -3)
    Path(f"/proc/{source['vCPU 0']}/timerslack_ns").write_text("12345")
    before = {name: Thread.of(thread) for name, thread in source.items()}
    assert before["first"].nice == 5
    hop(guest, new)
    assert {name: Thread.of(thread) for name, thread in threads(guest).items()} == before
    others = set(map(int, os.listdir(f"/proc/{guest.pid}/task"))) - set(threads(guest).values())
    names = {thread: Path(f"/proc/{thread}/comm").read_text() for thread in others}
    # One is a thread of the kernel, created by the vCPU that runs first.
    assert {Thread.of(thread).nice for thread, name in names.items() if not name.startswith("kvm-")} == {5}
    assert oom_score_adj(guest.pid) == "300"
    assert_unharmed(guest)


@contextmanager
def cgroup() -> Iterator[dict[str, Path]]:
    """A cgroup in each of some hierarchies, by controller; cgroup v1 alone has several. Its name is this run's own."""
    name = f"sevhop-test-{os.getpid()}"
    made = {}
    for controller in ("memory", "cpuset", "pids"):
        root = Path("/sys/fs/cgroup", controller)
        if (root / "cgroup.procs").exists():
            (root / name).mkdir()
            made[controller] = root / name
    if "cpuset" in made:
        for file in ("cpuset.cpus", "cpuset.mems"):
            (made["cpuset"] / file).write_text((made["cpuset"].parent / file).read_text())
    try:
        yield made
    finally:
        for group in made.values():
            for inner in [*(path for path in group.iterdir() if path.is_dir()), group]:
                # Busy while the kernel removes processes that have exited.
                wait_until(functools.partial(_removed, inner), 10, f"{inner} is empty")


def _removed(group: Path) -> bool:
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()


def test_process_and_threads_are_in_the_cgroups_of_the_source(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    with cgroup() as groups:
        if "cpuset" not in groups:
            pytest.skip("no cpuset hierarchy of cgroup v1")
        inner = groups["cpuset"] / "vcpu0"
        inner.mkdir()
        for file in ("cpuset.cpus", "cpuset.mems"):
            (inner / file).write_text((groups["cpuset"] / file).read_text())
        join = "; ".join(f"echo $$ >{group}/cgroup.procs" for group in groups.values())
        guest = start(Launched.like(counter_machine(), *shell(join)), old)
        guest.wait_for_ticks(3)
        (inner / "tasks").write_text(str(threads(guest)["vCPU 0"]))
        before = {name: Path(f"/proc/{thread}/cgroup").read_text() for name, thread in threads(guest).items()}
        assert f"cpuset:/{groups['cpuset'].name}/vcpu0\n" in before["vCPU 0"]
        hop(guest, new)
        assert {name: Path(f"/proc/{one}/cgroup").read_text() for name, one in threads(guest).items()} == before
        assert_unharmed(guest)
        guest.stop()


# -- refused ---------------------------------------------------------------------------------------


def test_cgroup_that_takes_no_more_processes_refuses(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    with cgroup() as groups:
        if "pids" not in groups:
            pytest.skip("no pids hierarchy of cgroup v1")
        guest = start(Launched.like(counter_machine(), *shell(f"echo $$ >{groups['pids']}/cgroup.procs")), old)
        guest.wait_for_ticks(3)
        pid = guest.pid
        (groups["pids"] / "pids.max").write_text((groups["pids"] / "pids.current").read_text())
        with pytest.raises((Refused, RolledBack)):
            HopDriver().run(guest, new)
        assert processes_of(guest.machine.directory) == [pid]
        assert_unharmed(guest)
        guest.stop()


def test_destination_in_another_cgroup_is_refused(
    old: Path,
    new: Path,
    counter_machine: DescribeCounter,
    start: StartGuest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If joining fails without an error."""
    with cgroup() as groups:
        join = "; ".join(f"echo $$ >{group}/cgroup.procs" for group in groups.values())
        guest = start(Launched.like(counter_machine(), *shell(join)), old)
        guest.wait_for_ticks(3)
        monkeypatch.setattr(Confinement, "cgroups_to_join", lambda _: [])
        assert_refused(guest, new, "cgroup is .* in the new QEMU")
        guest.stop()


def write_arguments(guest: Guest, old: bytes, new: bytes) -> None:
    """As a guest that has compromised its QEMU: change the command line in /proc."""
    assert len(old) == len(new)
    pid = guest.pid
    beginning = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[48 - 3])
    at = Path(f"/proc/{pid}/cmdline").read_bytes().index(old)
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(beginning + at)
        memory.write(new)


def test_sandbox_that_is_not_on_the_command_line_any_more_refuses(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    guest = start(counter_machine(more=("-sandbox", "on")), old)
    write_arguments(guest, b"-sandbox\0on\0", b"-smp\0cpus=1\0")
    checked = sevhop("check", "--qmp", guest.machine.monitor, "--emulator", new)
    assert "FAIL confinement" in checked.stdout
    assert_refused(guest, new, "confinement: .*1 seccomp filter.*the new QEMU would have 0")


def test_sandbox_that_only_the_destination_lacks_refuses(
    old: Path,
    new: Path,
    counter_machine: DescribeCounter,
    start: StartGuest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If that is not known before: both are compared when both run."""
    guest = start(counter_machine(more=("-sandbox", "on")), old)
    write_arguments(guest, b"-sandbox\0on\0", b"-smp\0cpus=1\0")
    monkeypatch.setattr("sevhop.checks.guest.reason_against", lambda *_: "")
    assert_refused(guest, new, "seccomp mode is 0 in the new QEMU, 2 in the old one")


def test_sandbox_that_forbids_less_refuses(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    """The kernel reports the number of filters, which is the same."""
    guest = start(counter_machine(more=("-sandbox", "on,spawn=deny")), old)
    write_arguments(guest, b"on,spawn=deny\0", b"on,enable=yes\0")
    assert_refused(guest, new, "the sandbox of the old QEMU forbids system calls that the new QEMU's allows")


@pytest.mark.parametrize("sandbox", ["on", SANDBOX])
def test_sandboxes_of_two_versions_forbid_the_same(
    sandbox: str, old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    guest = start(counter_machine(more=("-sandbox", sandbox)), old)
    guest.wait_for_ticks(3)
    for emulator in (new, old):
        hop(guest, emulator)
    assert_unharmed(guest)


def test_foreign_library_in_the_environment_refuses(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest, open_directory: Path
) -> None:
    """The environment, too, is read from QEMU."""
    open_directory.chmod(0o777)
    by = ("env", f"LD_PRELOAD={open_directory}/evil.so")
    guest = start(Launched.like(counter_machine(), *by), old)
    assert_refused(guest, new, f"LD_PRELOAD in its environment is .*everybody may write to {open_directory}")


def test_capabilities_that_a_new_qemu_would_not_get_refuse(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest, open_directory: Path
) -> None:
    with_capabilities = old.with_name(f"{old.name}-{open_directory.name}")
    shutil.copyfile(old, with_capabilities)
    try:
        with_capabilities.chmod(0o755)
        subprocess.run(["setcap", "cap_net_admin=ep", with_capabilities], check=True)
        os.chown(open_directory, NOBODY, NOBODY)
        machine = counter_machine(accelerator="tcg")
        machine = Machine(**{**vars(machine), "directory": open_directory})
        guest = start(Launched.like(machine, *user(NOBODY)), with_capabilities)
        assert_refused(guest, new, "confinement: .*capabilities are 0x1000, but")
    finally:
        with_capabilities.unlink()


# -- the library -----------------------------------------------------------------------------------


@pytest.fixture
def logging_machine(counter_machine: DescribeCounter, open_directory: Path) -> Machine:
    """A machine with a log that a second QEMU with its command line would truncate."""
    os.chown(open_directory, NOBODY, NOBODY)
    more = ("-chardev", f"file,id=log,path={open_directory / 'second.log'}", "-serial", "chardev:log")
    machine = counter_machine(more=more, accelerator="tcg")
    return Launched.like(Machine(**{**vars(machine), "directory": open_directory}), *user(NOBODY))


@pytest.mark.parametrize("kind", ["file-capabilities", "setuid", "clean-environment"])
def test_emulator_that_does_not_load_the_library_refuses(
    kind: str, old: Path, new: Path, logging_machine: Machine, start: StartGuest
) -> None:
    guest = start(logging_machine, old)
    (logging_machine.directory / "second.log").write_text("logged before\n")
    emulator = new.with_name(f"{new.name}-{logging_machine.directory.name}")
    try:
        if kind == "clean-environment":
            emulator.write_text(f'#!/bin/sh\nexec env -i PATH="$PATH" {new} "$@"\n')
        else:
            shutil.copyfile(new, emulator)
        emulator.chmod(0o4755 if kind == "setuid" else 0o755)
        if kind == "file-capabilities":
            subprocess.run(["setcap", "cap_net_admin=ep", emulator], check=True)
        assert_refused(guest, emulator, f"emulator: .* does not load .*adopt.so as user {NOBODY}")
    finally:
        emulator.unlink()
    assert (logging_machine.directory / "second.log").read_text() == "logged before\n"


def test_library_that_qemus_user_cannot_read_refuses(
    old: Path, new: Path, logging_machine: Machine, start: StartGuest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = logging_machine.directory / "closed"
    closed.mkdir(mode=0o700)
    shutil.copyfile(adopt_library.path(), closed / "adopt.so")
    monkeypatch.setattr(adopt_library, "path", lambda: closed / "adopt.so")
    guest = start(logging_machine, old)
    assert_refused(guest, new, f"library: the user of QEMU \\({NOBODY}\\) cannot read .* because of {closed}")


def test_emulator_is_probed_once_for_each_user(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a fraction of a second."""
    started = []
    spawn: Any = launch.spawn

    def counted(command: list[str], *rest: object, **more: object) -> object:
        started.append(command[0])
        return spawn(command, *rest, **more)

    guest = start(counter_machine(), old)
    monkeypatch.setattr(preload, "_probed", {})
    monkeypatch.setattr("sevhop.guest.emulator._known", {})
    monkeypatch.setattr(launch, "spawn", counted)
    for emulator in (new, old, new):
        hop(guest, emulator)
    probed = [path for path in started if started.count(path)]
    assert (probed.count(str(new)), probed.count(str(old))) == (3, 2)  # each hop starts one destination
    assert_unharmed(guest)


def test_command_starts_the_emulator_twice(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest, tmp_path: Path
) -> None:
    """It is probed while the command imports what it needs, and not again by the check."""
    guest = start(counter_machine(), old)
    started = tmp_path / "started"
    emulator = new.with_name(f"{new.name}-{tmp_path.name}")
    try:
        emulator.write_text(f'#!/bin/sh\necho "$2" >>{started}\nexec {new} "$@"\n')
        emulator.chmod(0o755)
        done = sevhop("hop", "--qmp", guest.machine.monitor, "--emulator", emulator)
    finally:
        emulator.unlink()
    assert done.returncode == 0, done
    assert started.read_text().splitlines()[:1] == ["none,accel=tcg:kvm"]
    assert len(started.read_text().splitlines()) == 2
    assert_unharmed(guest)


# -- out of memory ---------------------------------------------------------------------------------


def test_destination_is_killed_first_until_it_has_the_guest(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    guest = start(Launched.like(counter_machine(), *shell("echo 200 >/proc/self/oom_score_adj")), old)
    guest.wait_for_ticks(3)
    pid = guest.pid
    seen: list[int] = []

    def read_scores(running: Hop) -> None:
        seen[:] = [int(oom_score_adj(one)) for one in (pid, running.report.destination_pid)]

    def read_scores_and_fail(running: Hop) -> None:
        read_scores(running)
        running.interrupt()

    driver = HopDriver()
    with pytest.raises(RolledBack):
        driver.run(guest, new, at="stop", fault=read_scores_and_fail)
    assert seen[0] <= 0  # as low as we may
    assert seen[1] == 1000
    assert (guest.pid, oom_score_adj(pid)) == (pid, "200")
    assert interrupt_hop(guest, new, "phase stop", "command") == -signal.SIGKILL
    assert recover()["status"] == 0
    assert (guest.pid, oom_score_adj(pid)) == (pid, "200")
    driver.run(guest, new, at="stop", fault=read_scores)
    assert seen[1] == 1000
    assert oom_score_adj(guest.pid) == "200"
    assert_unharmed(guest)


@pytest.mark.parametrize("room", [2, 6, 15, 40, 70])
def test_full_cgroup_does_not_kill_the_source(
    room: int, old: Path, new: Path, linux_machine: DescribeLinux, start: StartGuest
) -> None:
    """:param room: mebibytes that are left in it."""
    with cgroup() as groups:
        if "memory" not in groups:
            pytest.skip("no memory hierarchy of cgroup v1")
        group = groups["memory"]
        guest = start(Launched.like(linux_machine(), *shell(f"echo $$ >{group}/cgroup.procs")), old)
        guest.wait_for_ticks(5)
        pid = guest.pid
        with contextlib.suppress(OSError):
            # What the kernel may drop is room as well, and how much that is depends on who has read the files before.
            (group / "memory.force_empty").write_text("0")
        used = int((group / "memory.usage_in_bytes").read_text())
        (group / "memory.limit_in_bytes").write_text(str(used + (room << 20)))
        try:
            if room < 20:
                with pytest.raises(Refused, match=f"{group} has room for"):
                    HopDriver().run(guest, new)
            else:
                with contextlib.suppress(Refused):
                    HopDriver().run(guest, new)
            assert room < 70 if guest.pid == pid else room >= 40
        finally:
            (group / "memory.limit_in_bytes").write_text("-1")
        guest.wait_for_ticks(5)
        guest.stop()


def test_threads_of_other_processes_are_ignored(old: Path, counter_machine: DescribeCounter, start: StartGuest) -> None:
    """A compromised QEMU could report them, to have their scheduling changed."""
    from sevhop.process.scheduling import Roles

    guest = start(counter_machine(), old)

    async def roles() -> Roles:
        async with await guest.monitor() as monitor:
            execute = monitor.execute

            async def lies(command: str, *rest: object, **more: object) -> object:
                if command == "query-cpus-fast":
                    return [{"cpu-index": 0, "thread-id": os.getpid()}]
                return await execute(command, *rest, **more)  # type: ignore[arg-type]

            monitor.execute = lies  # type: ignore[method-assign]
            process = QemuProcess.open(monitor.peer)
            try:
                return await Roles.of(monitor, process)
            finally:
                process.close()

    found = asyncio.run(roles())
    assert os.getpid() not in (*found.named.values(), *found.others)
