"""The lab's second stage and process 1: runs one command in the lab and reports.

Written against the few modules that start fast, because it runs in emulation. If it ends, the kernel panics; that,
too, ends the machine and is reported.
"""

from __future__ import annotations

import os
import select
import signal
import sys

sys.path.insert(0, os.path.abspath(__file__).rsplit("/", 3)[0])

from lab.sevlab import wire

PORT = "/dev/vport0p1"
CANNOT_EXECUTE = 126
NOT_FOUND = 127
CHUNK = 1 << 16


def prepare() -> None:
    """What a distribution's own start-up would do and the tests need."""
    _write("/proc/sys/kernel/hostname", "sevlab")
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(target, f"/dev/{name}")
    group = _group("kvm")
    for device in ("/dev/kvm", "/dev/sev"):
        os.chown(device, 0, group)
        os.chmod(device, 0o660)
    # Groups below the root may limit SEV contexts.
    _write("/sys/fs/cgroup/cgroup.subtree_control", "+misc")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _group(name: str) -> int:
    """The group's number, 0 if there is none of this name."""
    with open("/etc/group") as groups:
        return next((int(line.split(":")[2]) for line in groups if line.startswith(name + ":")), 0)


def run(job: wire.Job, port: int) -> int:
    """Run the command, pass on what it writes.

    :return: the exit status as a shell would see it.
    """
    out, out_far = os.pipe()
    err, err_far = os.pipe()
    child = os.fork()
    if child == 0:
        execute(job, out_far, err_far)
    os.close(out_far)
    os.close(err_far)
    kinds = {out: wire.OUT, err: wire.ERR}
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    poll = select.poll()
    for descriptor in (out, err, ended):
        os.set_blocking(descriptor, False)
        poll.register(descriptor, select.POLLIN)
    status = _reap(child)
    while status is None:
        for descriptor, _ in poll.poll():
            if descriptor == ended:
                os.read(ended, CHUNK)
                status = _reap(child)
            elif not _pass_on(descriptor, kinds[descriptor], port):
                poll.unregister(descriptor)
    # What it wrote before it ended is still in the pipes. Processes that it left behind do not hold up the end.
    for descriptor, kind in kinds.items():
        while _pass_on(descriptor, kind, port):
            pass
    return status if status >= 0 else 128 - status


def execute(job: wire.Job, out: int, err: int) -> None:
    """Become the command. Does not return; a failure is reported on its stderr, with a shell's exit status."""
    status = CANNOT_EXECUTE
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.setsid()
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
            signal.signal(number, signal.SIG_DFL)
        where = job.directory
        os.chdir(where)
        where = job.command[0]
        os.execvpe(where, job.command, job.environment)
    except FileNotFoundError as error:
        status = NOT_FOUND
        os.write(2, os.fsencode(f"lab: {where}: {error.strerror}\n"))
    except OSError as error:
        os.write(2, os.fsencode(f"lab: {where}: {error.strerror}\n"))
    finally:
        os._exit(status)


def _pass_on(descriptor: int, kind: bytes, port: int) -> bool:
    """False if there is nothing more, for now or forever."""
    try:
        data = os.read(descriptor, CHUNK)
    except BlockingIOError:
        return False
    if data:
        wire.send(port, kind, data)
    return bool(data)


def _reap(child: int) -> int | None:
    """Collect everything that has ended, orphans too. The child's exit code if it is among them, -N for signal N."""
    status = None
    while True:
        try:
            pid, wait_status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if pid == child:
            status = os.waitstatus_to_exitcode(wait_status)


def main() -> None:
    port = os.open(PORT, os.O_RDWR | os.O_CLOEXEC)
    try:
        with open("/run/sevlab/job", "rb") as file:
            job = wire.Job.from_bytes(file.read())
        prepare()
        wire.send(port, wire.UP)
        wire.send(port, wire.EXIT, str(run(job, port)).encode())
    except Exception as error:
        wire.send(port, wire.FAILED, os.fsencode(f"{type(error).__name__}: {error}"))
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
