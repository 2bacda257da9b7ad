"""``tools/lab/run`` itself: what goes in, what comes out, and that nothing is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from lab.sevlab import emulator, kernels
from lab.sevlab.kernels import CACHE

from tests.support.guests.running import wait_ended, wait_until

ROOT = Path(__file__).resolve().parents[2]
RUN = str(ROOT / "tools" / "lab" / "run")
LIMIT = 180  # seconds; the first use of a kernel downloads it


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """The emulator, which is built at the first use: that takes minutes, and is reported on stderr."""
    emulator.obtain()


def _run(*arguments: str | bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([RUN, *arguments], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT)


def test_lab_passes_command_and_output_unchanged() -> None:
    words = [b"two words", b"", b"'\"", b"$HOME `id` \\n *", b"new\nline", b"\xff\xfe", "żółw".encode(), b"--", b"-x"]
    script = b"printf '%s\\0' \"$@\"; echo to stderr >&2; echo x >tools/lab/written && echo x >/etc/written && exit 7"
    done = _run(b"sh", b"-c", script, b"sh", *words)
    assert done.stdout.split(b"\0")[:-1] == words
    assert done.stderr == b"to stderr\n"
    assert done.returncode == 7
    assert not (ROOT / "tools" / "lab" / "written").exists()
    assert not Path("/etc/written").exists()


def test_lab_is_a_clean_host_with_sev() -> None:
    done = _run(
        *("--processors", "1", "--memory", "512", "sh", "-ec"),
        """
        cat /sys/module/kvm_amd/parameters/sev /sys/module/kvm_amd/parameters/sev_es
        for directory in /tmp /run /var/tmp /dev/shm /root /etc/libvirt /var/lib/libvirt; do
            mkdir -p $directory && touch $directory/file
        done
        # Empty but for what was just written, and for the project where it lies below one of them.
        find /tmp /var/tmp -mindepth 1 -maxdepth 1 | while read -r entry; do
            case "$PWD/" in "$entry"/*) ;; *) echo "$entry" ;; esac
        done | sort
        test -c /dev/kvm && test -c /dev/sev && cut -d' ' -f1 /sys/fs/cgroup/misc.capacity
        test "$(cat /sys/class/net/lo/operstate)" != down
        unshare --mount true && nproc && test "$$" != 1 && echo "$SEVHOP_LAB" && pwd
        sleep 1000 &
        """,
    )
    assert done.stderr == b""
    words = ["Y", "Y", "/tmp/file", "/var/tmp/file", "sev", "sev_es", "1", "6.1", str(ROOT)]
    assert done.stdout.decode().splitlines() == words
    assert done.returncode == 0


def test_lab_reports_a_program_that_cannot_be_executed() -> None:
    programs = {"no-such-program": 127, "/etc/passwd": 126}
    labs = [subprocess.Popen([RUN, program], cwd=ROOT, stderr=subprocess.PIPE) for program in programs]
    for lab, (program, status) in zip(labs, programs.items(), strict=True):
        _, output = lab.communicate(timeout=LIMIT)
        assert lab.returncode == status
        assert program.encode() in output


def test_lab_boots_nothing_on_wrong_usage() -> None:
    done = _run("--kernel", "2.4", "true")
    assert done.returncode == 125
    assert b"2.4" in done.stderr


def test_lab_reports_a_kernel_panic_as_its_own_failure() -> None:
    done = _run("sh", "-c", "echo c >/proc/sysrq-trigger")
    assert done.returncode == 125
    assert b"sysrq triggered crash" in done.stderr
    assert done.stderr.endswith(b"lab: the lab died\n")


@contextmanager
def _started(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A lab that is booting or runs its command, and the pid of its emulator, which must have exited afterwards."""
    process = subprocess.Popen([RUN, *arguments], cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def emulators() -> list[int]:
        found = []
        for pid in children.read_text().split():
            with suppress(OSError):  # others come and go
                if b"qemu-system" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(int(pid))
        return found

    try:
        wait_until(lambda: bool(emulators()), LIMIT, "the lab starts")
        (emulator,) = emulators()
        yield process, emulator
        assert wait_ended(emulator, 20), "the emulator is still running"
    finally:
        process.kill()
        process.wait()


def test_lab_is_terminated_at_the_time_limit() -> None:
    with _started("--timeout", "9", "sleep", "1000") as (process, _):
        assert process.wait(LIMIT) == 124
        assert process.stderr
        assert b"time limit" in process.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_lab_exits_with_the_signal_if_interrupted(number: signal.Signals) -> None:
    with _started("sleep", "1000") as (process, _):
        process.send_signal(number)
        assert process.wait(20) == 128 + number


def test_lab_leaves_no_emulator_if_killed() -> None:
    with _started("sleep", "1000") as (process, _):
        process.kill()
        assert process.wait(20) == -signal.SIGKILL


def test_labs_of_two_kernels_run_at_once() -> None:
    processes = [
        subprocess.Popen([RUN, "--kernel", kernel, "uname", "-r"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for kernel in ("6.1", "6.12")
    ]
    for process, version in zip(processes, ("6.1.", "6.12."), strict=True):
        output, _ = process.communicate(timeout=LIMIT)
        assert process.returncode == 0
        assert output.startswith(version)


def test_lab_sees_no_sevhop_libvirt_or_temporary_files_of_host(tmp_path: Path) -> None:
    """/var/lib/sevhop is the one that the tests have for themselves, but the lab does not know that."""
    there = [Path("/var/lib/sevhop/seen"), Path("/dev/shm/seen"), tmp_path / "seen"]
    for path in there:
        path.touch()
    try:
        directories = ["/etc/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt"]
        done = _run("find", *directories, "/var/lib/sevhop", "/dev/shm", "-mindepth", "1")
        assert (done.stdout, done.stderr) == (b"", b"")
        assert _run("test", "-e", str(tmp_path)).returncode == 1
        assert _run("find", "/etc/apparmor.d/local", "-type", "f", "!", "-name", "README", "-size", "+0").stdout == b""
    finally:
        for path in there:
            path.unlink()


def test_cache_has_no_leftovers() -> None:
    names = {path.name for path in CACHE.iterdir()}
    entries = {*kernels.SERIES, "processor", "selinux"}
    assert names <= {name for entry in entries for name in (entry, f"{entry}.lock")}
    for directory in kernels.SERIES.keys() & names:
        inside = os.listdir(CACHE / directory)
        # Another version of the project has an initramfs of its own there.
        kinds = {re.sub(r"\.[0-9a-f]{16}$|(?<=^selftests)-.*-[0-9a-f]{8}$", "", name) for name in inside}
        assert kinds - {"selftests"} == {"initramfs", "root"}
    for build in (CACHE / "processor").iterdir():
        assert sorted(path.name for path in build.iterdir()) == ["qemu-system-x86_64", "source"]
