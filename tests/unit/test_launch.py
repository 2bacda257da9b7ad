"""A process gets the credentials of another one before it executes QEMU; here it executes something simpler."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sevhop.process.confinement import Confinement
from sevhop.process.launch import FIRST_TO_DIE, Identity, spawn
from sevhop.process.scheduling import Thread
from sevhop_qmp.process import QemuProcess

NOBODY = 65534
STATUS = ("/bin/cat", "/proc/self/status")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@pytest.fixture
def own() -> Identity:
    process = QemuProcess.open(os.getpid())
    try:
        return Identity(Confinement.of(process), Thread.of(process.pid))
    finally:
        process.close()


def run(identity: Identity, *command: str, **more: object) -> tuple[int, str, str]:
    with spawn(
        command,
        {"A": "b\udcff"},
        identity,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **more,  # type: ignore[arg-type]
    ) as child:
        out, err = child.communicate(timeout=30)
    return child.returncode, os.fsdecode(out), err.decode()


def facts(text: str) -> dict[str, str]:
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def test_launch_changes_nothing_for_the_same_identity(own: Identity) -> None:
    code, out, err = run(own, *STATUS)
    assert (code, err) == (0, "")
    mine = facts(Path("/proc/self/status").read_text())
    for name in ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp"):
        assert facts(out)[name] == mine[name], name


@pytest.mark.parametrize("ambient", [0, 1 << 12])
def test_user_and_its_capabilities_are_applied(own: Identity, ambient: int) -> None:
    three = (NOBODY, NOBODY, NOBODY)
    confined = own.confinement._replace(
        uids=three, gids=three, groups=(7,), inheritable=ambient, ambient=ambient, bounding=0x3000
    )
    code, out, err = run(own._replace(confinement=confined._replace(no_new_privs=True)), *STATUS)
    assert (code, err) == (0, "")
    found = facts(out)
    assert found["Uid"].split() == [str(NOBODY)] * 4
    assert found["Groups"] == "7"
    for name, expected in (("CapInh", ambient), ("CapPrm", ambient), ("CapEff", ambient), ("CapBnd", 0x3000)):
        assert int(found[name], 16) == expected, name
    assert found["NoNewPrivs"] == "1"


def test_root_gets_no_capabilities_beyond_its_bounding_set(own: Identity) -> None:
    code, out, _ = run(own._replace(confinement=own.confinement._replace(bounding=0)), *STATUS)
    assert code == 0
    assert {facts(out)[name] for name in ("CapPrm", "CapEff", "CapBnd")} == {"0" * 16}


def test_signals_are_neither_blocked_nor_ignored(own: Identity) -> None:
    """Otherwise a QEMU would not shut down at SIGTERM, whatever it was that called the command."""
    number = signal.SIGUSR1
    before, blocked = signal.signal(number, signal.SIG_IGN), signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        _, out, _ = run(own, *STATUS)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(number, before)
    assert {int(facts(out)[name], 16) for name in ("SigBlk", "SigIgn")} == {0}


def test_environment_is_that_of_the_command_alone(own: Identity) -> None:
    assert run(own, "/usr/bin/env") == (0, "A=b\udcff\n", "")


def test_library_in_the_environment_is_not_loaded_while_it_is_root(own: Identity, open_directory: Path) -> None:
    """The environment is read from a QEMU, which may be compromised."""
    open_directory.chmod(0o777)
    source = open_directory / "evil.c"
    source.write_text(
        "#include <fcntl.h>\n#include <unistd.h>\n"
        '__attribute__((constructor)) static void start(void) { int f = open("'
        f'{open_directory}/log", O_CREAT | O_APPEND | O_WRONLY, 0666); dprintf(f, "%d\\n", (int)geteuid()); }}\n'
    )
    command = ["cc", "-include", "stdio.h", "-shared", "-fPIC", "-o", str(open_directory / "evil.so"), str(source)]
    subprocess.run(command, check=True)
    three = (NOBODY, NOBODY, NOBODY)
    other = own._replace(confinement=own.confinement._replace(uids=three, gids=three, groups=()))
    with spawn(STATUS, {"LD_PRELOAD": str(open_directory / "evil.so")}, other) as child:
        assert child.wait(30) == 0
    assert set((open_directory / "log").read_text().split()) == {str(NOBODY)}


def test_limits_and_scheduling_are_applied(own: Identity) -> None:
    limits = tuple(
        (number, 4096, 8192) if number == resource.RLIMIT_FSIZE else (number, soft, hard)
        for number, soft, hard in own.confinement.limits
    )
    scheduling = own.scheduling._replace(nice=7, affinity=frozenset({0}), io_priority=0x4003)
    identity = Identity(own.confinement._replace(limits=limits), scheduling)
    script = "ulimit -f; nice; taskset -cp $$; ionice -p $$; cat /proc/self/oom_score_adj"
    code, out, err = run(identity, "/bin/sh", "-c", script)
    assert (code, err) == (0, "")
    assert out.splitlines()[:2] == ["8", "7"]
    assert out.splitlines()[2].endswith("list: 0")
    assert out.splitlines()[3:] == ["best-effort: prio 3", str(FIRST_TO_DIE)]


def test_working_directory_is_a_descriptor(own: Identity, tmp_path: Path) -> None:
    """Renaming a directory in its path has no effect."""
    (tmp_path / "first").mkdir()
    directory = os.open(tmp_path / "first", os.O_PATH)
    (tmp_path / "first").rename(tmp_path / "second")
    try:
        assert run(own, "/bin/pwd", directory=directory) == (0, f"{tmp_path}/second\n", "")
    finally:
        os.close(directory)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (
            {"cgroups": ["/sys/fs/cgroup/there-is-none"]},
            "cannot apply the cgroup of the old QEMU to the new one: /sys/fs/cgroup/there-is-none: No",
        ),
        ({"command": "/no/qemu"}, "cannot execute /no/qemu: No such file or directory"),
    ],
)
def test_process_does_not_start_if_a_step_fails(own: Identity, changed: dict[str, object], reason: str) -> None:
    command = [str(changed.pop("command", "/bin/true"))]
    code, out, err = run(own, *command, **changed)
    assert (code, out) == (1, "")
    assert reason in err
    assert len(err.splitlines()) == 1


def test_process_does_not_start_with_a_limit_above_our_own(own: Identity) -> None:
    limits = ((resource.RLIMIT_NOFILE, 1 << 40, 1 << 40),)
    code, _, err = run(own._replace(confinement=own.confinement._replace(limits=limits)), "/bin/true")
    assert code == 1
    assert "sevhop: cannot apply the resource limits of the old QEMU to the new one: " in err


def test_command_is_not_executed_before_the_gate_is_open(own: Identity) -> None:
    gate, opened = os.pipe()
    try:
        with spawn(("/bin/echo", "runs"), {}, own, gate=gate, stdout=subprocess.PIPE) as child:
            # Its parent decides: this process is in whatever cgroup that puts it, when it opens its files.
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(0.5)
            os.write(opened, b"\0")
            assert child.communicate(timeout=30)[0] == b"runs\n"
    finally:
        os.close(gate)
        os.close(opened)


def test_command_is_not_executed_if_its_parent_exits_before(own: Identity) -> None:
    gate, opened = os.pipe()
    with spawn(("/bin/echo", "runs"), {}, own, gate=gate, stdout=subprocess.PIPE) as child:
        os.close(gate)
        os.close(opened)
        assert child.communicate(timeout=30)[0] == b""
    assert child.returncode == 1


@pytest.mark.parametrize(("offset", "status"), [(0, 0), (1, 1)], ids=["parent", "another"])
def test_process_ends_if_its_parent_has_exited_before_it_could_notice(offset: int, status: int) -> None:
    """A command that is killed while it starts an emulator that hangs."""
    script = "import os, sys; from sevhop.process import launcher; launcher._end_with_parent(int(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", script, str(os.getpid() + offset)], check=False)
    assert done.returncode == status
