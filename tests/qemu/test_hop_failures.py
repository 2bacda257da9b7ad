"""
Bad input and failures: a clear line, and the guest untouched or rolled back.

In every test the guest's counter keeps running afterwards, without a missing tick. The only exception is a source that
exits before its state was saved: that guest is lost, which is reported.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sevhop.engine import hop as engine
from sevhop.engine import transfer
from sevhop.engine.check import Checked
from sevhop.engine.hop import Hop
from sevhop.errors import GuestLost, RecoveryRequired, Refused, RolledBack
from sevhop.keeper.local import LocalKeeper
from sevhop_qmp.monitor import Monitor

from tests.support.guests.machine import I440FX, Machine
from tests.support.guests.running import Guest, processes_of, wait_ended, wait_until

from .conftest import DescribeCounter, StartGuest
from .hops import (
    BEFORE_COMMIT,
    Fault,
    HopDriver,
    ObservedHop,
    assert_unharmed,
    followed_by,
    hang_destination,
    hop,
    interrupt,
    kill_destination,
    kill_source,
    sevhop,
)


@pytest.fixture
def guest(old: Path, counter_machine: DescribeCounter, start: StartGuest) -> Guest:
    """A counting guest in the older QEMU."""
    guest = start(counter_machine(), old)
    guest.wait_for_ticks(5)
    return guest


def assert_untouched(guest: Guest, pid: int) -> None:
    """The guest counts on where it was."""
    assert guest.pid == pid
    assert guest.execute("query-status")["status"] == "running"
    assert_unharmed(guest)


# -- refused: nothing is touched -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"memory": "private"}, "memory: pc.ram is private to its QEMU"),
        ({"more": ("-object", "memory-backend-memfd,id=other,size=16M,share=off")}, "other is private to its QEMU"),
        ({"more": ("-netdev", "socket,id=n,mcast=230.0.0.1:1234")}, "command line: -netdev socket"),
        ({"more": ("-chardev", "pipe,id=c,path={}/pipe")}, "a pipe character device cannot be opened twice"),
        ({"more": ("-drive", "file=fat:rw:{},format=raw,if=virtio")}, "The vvfat (rw) format"),
        (
            {"more": ("-blockdev", "driver=null-co,node-name=n", "-device", "nvme,drive=n,serial=1")},
            "non-migratable device",
        ),
        ({"more": ("-S",)}, "state: the guest is prelaunch"),
    ],
)
def test_guest_that_cannot_hop_is_refused(
    fields: dict[str, object],
    reason: str,
    old: Path,
    new: Path,
    tmp_path: Path,
    counter_machine: DescribeCounter,
    start: StartGuest,
) -> None:
    os.mkfifo(tmp_path / "pipe.in")
    os.mkfifo(tmp_path / "pipe.out")
    if "more" in fields:
        fields = {"more": tuple(str(word).format(tmp_path) for word in fields["more"])}  # type: ignore[attr-defined]
    guest = start(counter_machine(**fields), old)
    pid = guest.pid
    with pytest.raises(Refused) as caught:
        HopDriver().run(guest, new)
    assert reason in str(caught.value)
    done = sevhop("hop", "--qmp", guest.machine.monitor, "--emulator", new)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert reason in line
    assert "nothing was touched" in line
    checked = sevhop("check", "--qmp", guest.machine.monitor, "--emulator", new)
    assert checked.returncode == 1
    assert "FAIL" in checked.stdout
    if "prelaunch" in reason:
        guest.execute("cont")
    assert_untouched(guest, pid)


def test_guest_with_two_user_networks_is_refused_an_older_qemu_only(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    """The older one would exit when it loads the second's state: by QEMU's number of it there is none."""
    second = ("-netdev", "user,id=second,restrict=on", "-device", "virtio-net-pci,netdev=second,romfile=")
    guest = start(counter_machine(network=True, more=second), old)
    guest.wait_for_ticks(5)
    hop(guest, new)
    pid = guest.pid
    with pytest.raises(Refused, match="cannot load the state of 2 user networks"):
        HopDriver().run(guest, old)
    assert_untouched(guest, pid)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"type": I440FX}, "machine type is pc-i440fx-7.2 in the new QEMU, pc-q35-7.2 in the old QEMU"),
        ({"cpus": 2}, "number of vCPUs is 2 in the new QEMU, 1 in the old QEMU"),
        ({"memory_mib": 48}, "memory"),
        ({"accelerator": "tcg"}, "accelerator is tcg in the new QEMU"),
        ({"more": ("-device", "virtio-rng-pci,id=rng0")}, "device rng0 is not in the old QEMU"),
        ({"more": ("-no-such-option",)}, "no-such-option"),
        ({"memory": "private"}, "memory"),
    ],
)
def test_guest_stays_if_the_destination_is_another_machine(
    other: dict[str, object], reason: str, guest: Guest, new: Path, counter_machine: DescribeCounter
) -> None:
    if "accelerator" in other and guest.machine.accelerator == "tcg":
        pytest.skip("there is only TCG here, so accelerators cannot differ")
    pid = guest.pid
    machine: Machine = counter_machine(**other)
    driver = HopDriver()
    with pytest.raises((Refused, RolledBack)) as caught:
        driver.run(guest, new, command=machine.command(new))
    assert reason in str(caught.value)
    assert "stop" not in driver.phases
    assert_untouched(guest, pid)


@pytest.mark.parametrize("program", ["/nonexistent/qemu", "/etc/passwd", "/bin/true"])
def test_emulator_that_is_no_qemu_is_refused(program: str, guest: Guest) -> None:
    with pytest.raises(Refused, match="emulator"):
        HopDriver().run(guest, Path(program))
    assert_untouched(guest, guest.pid)


def test_emulator_writable_by_everybody_is_refused(guest: Guest, new: Path, tmp_path: Path) -> None:
    fake = write_emulator(tmp_path / "emulator", new, "")
    fake.chmod(0o707)
    with pytest.raises(Refused, match=f"everybody may write to {fake}"):
        HopDriver().run(guest, fake)
    assert_untouched(guest, guest.pid)


def test_emulator_without_the_machine_type_is_refused(guest: Guest, tmp_path: Path) -> None:
    """One that knows only the machine without parts."""
    greeting = json.loads(GREETING)
    said = [greeting, {"return": {}}, {"return": [{"name": "none"}]}, {"return": {}}]
    fake = tmp_path / "emulator"
    fake.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(map(json.dumps, said)) + "\nEND\n")
    fake.chmod(0o755)
    with pytest.raises(Refused, match=r"machine type: QEMU 10\.0\.0 has no pc-q35-7\.2"):
        HopDriver().run(guest, fake)
    assert_untouched(guest, guest.pid)


def write_emulator(path: Path, new: Path, body: str) -> Path:
    """A program that claims to be QEMU and then does something else."""
    # The path of an interpreter in the first line has no spaces.
    program = path.with_name(f"{path.name}.py")
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(program))} "$@"\n')
    program.write_text(
        "import os, re, socket, sys, time\n"
        "number = re.search(r'id=sevhop-monitor,fd=(\\d+)', ' '.join(sys.argv))\n"
        f"if not number: os.execv({str(new)!r}, sys.argv)\n"
        "listener = socket.socket(fileno=int(number[1]))\n" + body
    )
    path.chmod(0o700)
    return path


GREETING = '{"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 0}, "package": ""}, "capabilities": []}}'


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("sys.exit('cannot allocate memory')", "cannot allocate memory"),
        ("monitor, _ = listener.accept(); monitor.sendall(b'\\x7fELF garbage\\n'); time.sleep(60)", "did not start"),
        (
            "monitor, _ = listener.accept()\n"
            f"monitor.sendall({GREETING.encode()!r} + b'\\n')\n"
            "while data := monitor.recv(4096):\n"
            '    number = re.search(rb\'"id": ?"__qmp#\\d+"\', data)\n'
            "    monitor.sendall(b'{\"return\": {}%s}\\n' % (b', ' + number[0] if number else b''))\n",
            "invalid answer from QEMU",
        ),
        ("time.sleep(60)", "did not start"),
    ],
)
def test_hop_is_rolled_back_with_a_broken_emulator(
    body: str, reason: str, guest: Guest, new: Path, tmp_path: Path
) -> None:
    pid = guest.pid
    fake = write_emulator(tmp_path / "emulator", new, body)
    driver = HopDriver()
    with pytest.raises(RolledBack, match=reason):
        driver.run(guest, fake, start_timeout=2)
    assert "stop" not in driver.phases
    assert_untouched(guest, pid)


# -- the monitor -----------------------------------------------------------------------------------


def test_hop_is_refused_without_a_monitor(tmp_path: Path) -> None:
    done = sevhop("hop", "--qmp", tmp_path / "none.sock")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "No such file or directory" in done.stderr


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH\r\n", b"{}\n", b""])
def test_socket_that_is_not_qmp_is_refused(greeting: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def serve() -> None:
            peer, _ = server.accept()
            peer.sendall(greeting)
            peer.recv(4096)
            peer.close()

        thread = threading.Thread(target=serve)
        thread.start()
        done = sevhop("hop", "--qmp", path, "--timeout", "1")
        thread.join()
    assert done.returncode == 1
    assert "QMP" in done.stderr
    assert done.stderr.count("\n") == 1


def test_hop_is_refused_while_another_client_is_connected(guest: Guest, new: Path) -> None:
    pid = guest.pid

    async def while_held() -> subprocess.CompletedProcess[str]:
        async with await Monitor.connect(guest.machine.monitor):
            return await asyncio.to_thread(
                sevhop, "hop", "--qmp", guest.machine.monitor, "--emulator", new, "--timeout", "1"
            )

    done = asyncio.run(while_held())
    assert done.returncode == 1
    assert "another client is connected" in done.stderr
    assert_untouched(guest, pid)


def test_second_hop_is_refused_while_one_is_in_progress(guest: Guest, new: Path) -> None:
    """Not when the old QEMU has exited, with which it would believe the guest lost."""
    refused: list[subprocess.CompletedProcess[str]] = []

    def again(_: object) -> None:
        refused.append(sevhop("hop", "--qmp", guest.machine.monitor, "--emulator", new, "--json"))

    HopDriver().run(guest, new, at="prepare", fault=again)
    (done,) = refused
    report = json.loads(done.stdout)
    assert (done.returncode, report["outcome"], report["guest_state"]) == (1, "refused", "untouched")
    assert f"process {os.getpid()} is hopping" in report["reason"]
    assert_unharmed(guest)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_emulator_that_hangs_ends_with_the_command(number: signal.Signals, guest: Guest, tmp_path: Path) -> None:
    pid = guest.pid
    hanging, never = tmp_path / "hanging", tmp_path / "never"
    os.mkfifo(never)
    hanging.write_text(f"#!/bin/sh\nread line <{never}\n")
    hanging.chmod(0o755)
    command = [sys.executable, "-m", "sevhop.cli", "hop", "--qmp", str(guest.machine.monitor)]
    with subprocess.Popen([*command, f"--emulator={hanging}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as hop:
        wait_until(lambda: set(processes_of(hanging)) - {hop.pid} != set(), 30, "the emulator is probed")
        hop.send_signal(number)
        wait_until(lambda: processes_of(hanging) == [], 30, "both have ended")
    assert_untouched(guest, pid)


def test_monitor_behind_a_proxy_is_refused(guest: Guest, new: Path, tmp_path: Path) -> None:
    """A proxy speaks QMP but is not the process that has the guest."""
    path = tmp_path / "proxy.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def serve() -> None:
            client, _ = server.accept()
            with client, socket.socket(socket.AF_UNIX) as qemu:
                qemu.connect(str(guest.machine.monitor))
                back = threading.Thread(target=relay, args=(qemu, client))
                back.start()
                relay(client, qemu)
                qemu.shutdown(socket.SHUT_RDWR)
                back.join()

        def relay(source: socket.socket, sink: socket.socket) -> None:
            try:
                while data := source.recv(65536):
                    sink.sendall(data)
            except OSError:
                pass

        thread = threading.Thread(target=serve)
        thread.start()
        done = sevhop("hop", "--qmp", path, "--emulator", new)
        thread.join()
    assert done.returncode == 1, done
    assert done.stderr.count("\n") == 1
    assert_unharmed(guest)


# -- rolled back: the guest keeps running where it was ---------------------------------------------


@pytest.mark.parametrize("at", BEFORE_COMMIT)
@pytest.mark.parametrize("fault", [kill_destination, interrupt])
def test_hop_is_rolled_back_by_a_failure_before_the_commit(at: str, fault: Fault, guest: Guest, new: Path) -> None:
    pid = guest.pid
    with pytest.raises(RolledBack) as caught:
        HopDriver().run(guest, new, at=at, fault=fault)
    assert re.search("interrupted" if fault is interrupt else "new QEMU(: it)? (exited|stopped)", str(caught.value))
    assert_untouched(guest, pid)


@pytest.mark.parametrize("at", ["map", "load"])
def test_hop_is_rolled_back_if_the_destination_hangs(at: str, guest: Guest, new: Path) -> None:
    pid = guest.pid
    with pytest.raises(RolledBack, match="within 1 s"):
        HopDriver().run(guest, new, at=at, fault=hang_destination, timeout=1)
    assert_untouched(guest, pid)


def test_hop_is_rolled_back_if_interrupted_while_preparing(guest: Guest, new: Path) -> None:
    pid = guest.pid
    for at in ("acquire", "prepare"):
        with pytest.raises(RolledBack, match="interrupted"):
            HopDriver().run(guest, new, at=at, fault=interrupt)
    assert_untouched(guest, pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_hop_is_rolled_back_by_signals(number: signal.Signals, guest: Guest, new: Path, tmp_path: Path) -> None:
    pid = guest.pid
    # Its destination takes for ever to start, so the signal is in time.
    slow = write_emulator(tmp_path / "emulator", new, "time.sleep(600)")
    command = [sys.executable, "-m", "sevhop.cli", "-v", "hop", "--qmp", str(guest.machine.monitor)]
    with subprocess.Popen([*command, "--emulator", str(slow)], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "prepare" in line:
                process.send_signal(number)
                break
        rest = process.stderr.read()
    assert process.returncode == 3
    assert rest.splitlines()[-1].endswith("interrupted; the guest is running in the old QEMU")
    assert_untouched(guest, pid)


def test_interrupt_after_the_commit_is_ignored(guest: Guest, old: Path, new: Path) -> None:
    refused: list[bool] = []
    for emulator, at in ((new, "commit"), (old, "finish")):
        report = HopDriver().run(guest, emulator, at=at, fault=lambda hop: refused.append(hop.interrupt()))
        assert report.outcome == "done"
    assert refused == [False, False]
    assert_unharmed(guest)


def test_hop_requires_recovery_if_interrupted_when_guest_runs(guest: Guest, new: Path) -> None:
    """The destination has reported it, and the command has not read that yet."""

    def late(hop: ObservedHop) -> None:
        state, keeper = hop.prepared.transfer, hop.prepared.started.keeper

        def interrupt_when_reported() -> None:
            assert isinstance(keeper, LocalKeeper)
            assert select.select([keeper._ours], [], [], 10)[0]
            assert hop.interrupt()

        state.end = followed_by(state.end, interrupt_when_reported)  # type: ignore[assignment]

    driver = HopDriver()
    with pytest.raises(RecoveryRequired, match="interrupted; the guest runs in the new QEMU"):
        driver.run(guest, new, at="load", fault=late)
    assert "runs in the new QEMU" in sevhop("recover").stdout
    assert guest.pid == driver.hop.report.destination_pid
    assert_unharmed(guest)


@contextmanager
def image_locked(image: Path) -> Iterator[None]:
    """Hold an image as QEMU does for a program that lets nobody else write (block/file-posix.c)."""
    with image.open("r+b") as file:
        others_must_not_write = 201
        lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, others_must_not_write, 1, 0)
        f_ofd_setlk = 37
        fcntl.fcntl(file, f_ofd_setlk, lock)
        yield


def test_hop_is_rolled_back_if_another_program_locks_the_image(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    """Another program locks the disk while neither QEMU has locked it, and unlocks it a while later."""
    guest = start(counter_machine(disk_mib=16), old)
    guest.wait_for_ticks(5)
    pid = guest.pid
    threads = []

    def grab(hop: Hop) -> None:
        locked = threading.Event()

        def hold() -> None:
            with image_locked(guest.machine.disk):
                locked.set()
                # The destination is terminated when it cannot lock the disk. Then the source locks it again.
                assert wait_ended(hop.report.destination_pid, 30)

        threads.append(threading.Thread(target=hold))
        threads[0].start()
        assert locked.wait(10)

    with pytest.raises(RolledBack, match="lock"):
        HopDriver().run(guest, new, at="load", fault=grab)
    threads[0].join()
    assert_untouched(guest, pid)


def test_hop_is_rolled_back_if_somebody_resumes_the_source(
    tmp_path: Path, old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    second = tmp_path / "second.sock"
    guest = start(counter_machine(more=("-qmp", f"unix:{second},server=on,wait=off")), old)
    guest.wait_for_ticks(5)
    pid = guest.pid

    def interfere(_: Hop) -> None:
        thread = threading.Thread(target=lambda: asyncio.run(cont(second)))
        thread.start()
        thread.join()

    with pytest.raises(RolledBack, match="another client has resumed the guest"):
        HopDriver().run(guest, new, at="load", fault=interfere)
    assert_untouched(guest, pid)


async def cont(path: Path) -> None:
    async with await Monitor.connect(path) as monitor:
        await monitor.execute("cont")


# -- the source dies or hangs ----------------------------------------------------------------------


@pytest.mark.parametrize("at", ["acquire", "prepare", "stop", "map"])
def test_guest_is_reported_lost_if_the_source_exits_before_save(at: str, guest: Guest, new: Path) -> None:
    """
    The guest is lost with its QEMU, not by the hop. That is reported, and nothing is left. (At "save" its state may be
    in the pipe already: see test_recover.py.)
    """
    with pytest.raises(GuestLost, match=r"the old QEMU exited unexpectedly"):
        HopDriver().run(guest, new, at=at, fault=kill_source)


def test_guest_is_reported_lost_if_the_source_exits_in_the_rollback(
    guest: Guest, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A QEMU that shuts down has hung up before it has exited, and nothing is left for ``sevhop recover``."""
    execute = Monitor.execute
    pid = guest.pid

    async def quit_first(self: Monitor, command: str, *arguments: Any, **options: Any) -> Any:
        if self.peer == pid and command == "query-status":
            await execute(self, "quit")
        return await execute(self, command, *arguments, **options)

    def fail(_: Hop) -> None:
        monkeypatch.setattr(Monitor, "execute", quit_first)
        raise RuntimeError("as wanted")

    with pytest.raises(GuestLost, match=r"the old QEMU exited unexpectedly"):
        HopDriver().run(guest, new, at="map", fault=fail)


def test_guest_survives_source_killed_after_load(guest: Guest, new: Path) -> None:
    for at in ("commit", "resume"):
        report = HopDriver().run(guest, new, at=at, fault=kill_source)
        assert report.outcome == "done"
        guest.wait_for_ticks(5)
        if at == "commit":
            new = Path(os.readlink(f"/proc/{guest.pid}/exe"))
    assert_unharmed(guest)


def test_recover_finishes_hop_after_both_qemus_failed(guest: Guest, new: Path) -> None:
    """Once the guest runs there, a destination that does not answer is left alone."""

    def both(hop: Hop) -> None:
        kill_source(hop)
        hang_destination(hop)

    driver = HopDriver()
    with contextlib.suppress(RecoveryRequired):  # raised if it has not reported yet that it has loaded everything
        assert driver.run(guest, new, at="commit", fault=both, timeout=1).notes
    stuck = sevhop("recover", "--timeout", "1")
    assert stuck.returncode == 4
    assert "does not answer" in stuck.stdout
    os.kill(driver.hop.report.destination_pid, signal.SIGCONT)
    # It may need more than one attempt until it answers.
    wait_until(lambda: "runs in the new QEMU" in sevhop("recover").stdout, 120, "it answers, and is recovered")
    assert guest.pid == driver.hop.report.destination_pid
    assert_unharmed(guest)


def test_hop_is_rolled_back_if_the_source_hangs_for_a_while(
    guest: Guest, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It did not stop in time, so the hop is rolled back; the guest is resumed as soon as it answers again."""
    pid = guest.pid
    threads: list[threading.Thread] = []

    driver = HopDriver()

    def wake() -> None:
        assert wait_ended(driver.hop.report.destination_pid, 30)
        os.kill(pid, signal.SIGCONT)

    def hang() -> None:
        os.kill(pid, signal.SIGSTOP)
        threads.append(threading.Thread(target=wake))
        threads[0].start()

    monkeypatch.setattr(transfer, "verify_unchanged", followed_by(transfer.verify_unchanged, hang))
    with pytest.raises(RolledBack, match="did not answer stop within 1 s"):
        driver.run(guest, new, timeout=1)
    threads[0].join()
    assert_untouched(guest, pid)


# -- a move without SEV ----------------------------------------------------------------------------


def test_hop_is_rolled_back_if_the_kernel_refuses_the_move(
    guest: Guest, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source without the context that it claims to have: the kernel refuses, and the hop is rolled back."""
    if guest.machine.accelerator != "kvm":
        pytest.skip("the move is a KVM call, and KVM does not work here")
    pid = guest.pid

    def claim() -> None:
        monkeypatch.setattr(Checked, "has_context", True)

    monkeypatch.setattr(Checked, "autostart", False)
    monkeypatch.setattr(engine, "load", followed_by(transfer.load, claim))
    driver = HopDriver()
    with pytest.raises(RolledBack, match="EINVAL"):
        driver.run(guest, new)
    assert_untouched(guest, pid)
