"""
The destination: a new QEMU process that looks, to the system, like the one it replaces.

It gets the source's user, working directory, environment, and whatever else confines or favours the source
(:mod:`sevhop.process.confinement`, :mod:`sevhop.process.scheduling`), so that relative paths, permissions and
accounting stay what they were, and adopt.so, so that it adopts the guest instead of launching one. It waits for an
incoming stream, and no vCPU runs before the end of that.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

from sevhop_qmp import adopt_library, selinux
from sevhop_qmp.credentials import Credentials
from sevhop_qmp.errors import MonitorError, SevhopError
from sevhop_qmp.monitor import COMMAND_TIMEOUT, Monitor
from sevhop_qmp.process import QemuProcess

from ..guest import command_line
from ..keeper.local import LocalKeeper
from ..options import HopOptions
from ..process import launch
from ..process.apparmor_profile import ProfileCopy
from ..process.confinement import Confinement
from ..process.launch import Identity
from ..process.machine_cgroup import MachineCgroup
from ..process.scheduling import Thread
from ..records import run_directory

#: Seconds in which a killed process must exit.
KILL_TIMEOUT = 10.0
#: Seconds in which a QEMU that has hung up exits.
_JUST_ENDED = 0.2

#: Name of the monitor's socket in the directory of the hop.
MONITOR = "monitor"


class LaunchContext(NamedTuple):
    """
    The environment of the source, for the destination: read early, because the source may have exited by then.

    :ivar stdout: a duplicate of its standard output; the same for ``stderr``.
    :ivar identity: what the destination takes on; None for one that starts as ourselves.
    :ivar directory: descriptor of the working directory; None for one that starts as ourselves.
    :ivar namespaces: descriptors of those that it enters; only with an identity.
    :ivar cgroups: those that it is put into; by default it joins the source's.
    :ivar profile: a loaded copy of the source's, which confines it; by default the source's own does.
    :ivar keep: further descriptors that it inherits.
    """

    credentials: Credentials
    working_directory: str
    environment: dict[str, str]
    limits: dict[int, tuple[int, int]]
    stdout: int
    stderr: int
    identity: Identity | None = None
    directory: int | None = None
    namespaces: tuple[int, ...] = ()
    cgroups: MachineCgroup | None = None
    profile: ProfileCopy | None = None
    keep: tuple[int, ...] = ()

    @classmethod
    def of(cls, source: QemuProcess) -> Self:
        """:raises ProcessError: the source has exited, or permission is denied."""
        identity = Identity(Confinement.of(source), Thread.of(source.pid))
        directory = source.open_working_directory()
        return cls(
            source.credentials,
            source.working_directory,
            launch.inheritable(source.environment),
            source.limits,
            _duplicate_or_null(source, 1),
            _duplicate_or_null(source, 2),
            identity,
            directory,
        )

    def close(self) -> None:
        """Close the descriptors."""
        for descriptor in (self.stdout, self.stderr, self.directory, *self.namespaces, *self.keep):
            if descriptor is not None:
                os.close(descriptor)


async def connect(process: QemuProcess, path: Path | str, *, timeout: float) -> Monitor:
    """
    Connect to the monitor of a known process.

    :param timeout: seconds for each command.
    :raises MonitorError: it does not answer, or the path leads to another process.
    """
    monitor = await Monitor.connect(path, timeout=timeout, greeting_timeout=timeout)
    if monitor.peer != process.pid:
        await monitor.close()
        raise MonitorError(f"{path} is not served by process {process.pid}", "find out which process has that socket")
    return monitor


class Destination:
    """
    A started destination. :meth:`start`, then either :meth:`release` or :meth:`kill` it.

    It is our child, in a session of its own. When we exit, init becomes its parent; until then we must reap it.

    :ivar directory: its own, below ``/run/sevhop``; its monitor is there, so that another process can :meth:`reach`
        it if this one exits. Removed when the destination is released or killed.
    """

    def __init__(
        self,
        process: QemuProcess,
        directory: Path,
        child: subprocess.Popen[bytes] | None = None,
        log: BinaryIO | None = None,
    ) -> None:
        self.process = process
        self.directory = directory
        self._child = child
        self._log = log
        self._monitor: Monitor | None = None

    @property
    def monitor(self) -> Monitor:
        """Connected to it."""
        assert self._monitor is not None
        return self._monitor

    @monitor.setter
    def monitor(self, monitor: Monitor) -> None:
        self._monitor = monitor

    @classmethod
    async def reach(cls, process: QemuProcess, directory: Path, *, timeout: float = COMMAND_TIMEOUT) -> Self:
        """
        Connect to a destination that another process has started.

        :raises MonitorError: it does not answer.
        """
        self = cls(process, directory)
        self.monitor = await connect(process, directory / MONITOR, timeout=timeout)
        return self

    @classmethod
    async def start(
        cls,
        emulator: str,
        arguments: Sequence[str],
        launch_context: LaunchContext,
        keeper: LocalKeeper,
        *,
        timeout: float = HopOptions.start_timeout,
        command_timeout: float = COMMAND_TIMEOUT,
        started: Callable[[QemuProcess, Path], Awaitable[None]] | None = None,
        directory: Path | None = None,
        within: Sequence[str] = (),
        keep: Sequence[int] = (),
        paused: bool = True,
    ) -> Self:
        """
        Start a destination and connect to it.

        :param emulator: path of the QEMU binary.
        :param arguments: its command line without the program; what makes a destination of it is added here.
        :param timeout: seconds until its monitor must answer.
        :param command_timeout: seconds for each command afterwards.
        :param started: awaited as soon as the process exists, with it and the directory of its monitor.
        :param directory: created for its monitor; by default one with a random name.
        :param within: command prefix: a program that executes QEMU in other namespaces.
        :param keep: descriptors that it inherits.
        :param paused: whether it stays paused when it has loaded everything; otherwise it starts the guest.
        :raises SevhopError: it did not start; the message has QEMU's own reason when it gave one.
        """
        if directory is None:
            directory = run_directory.make()
        else:
            directory.mkdir(mode=0o700)
        with selinux.sharing_sockets():
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # QEMU's messages during the start are needed for errors; later they go where the source's went.
        log = os.fdopen(os.memfd_create("sevhop-destination-log"), "r+b")
        environment = dict(launch_context.environment)
        theirs = f"fd:{keeper.theirs.fileno()}"
        environment |= adopt_library.environment(theirs, launch_context.stderr, inherited=environment)
        gate, opened = os.pipe2(os.O_CLOEXEC)
        try:
            selinux.share(log.fileno())
            listener.bind(str(directory / MONITOR))
            listener.listen()
            child = _spawn(
                [*within, emulator, *command_line.incoming(list(arguments), listener.fileno(), paused=paused)],
                launch_context,
                environment,
                stderr=log.fileno(),
                gate=gate,
                keep=[
                    *(listener.fileno(), keeper.theirs.fileno(), launch_context.stderr),
                    *launch_context.keep,
                    *keep,
                ],
            )
        except (OSError, subprocess.SubprocessError) as err:
            os.close(opened)
            log.close()
            shutil.rmtree(directory, ignore_errors=True)
            reason = getattr(err, "strerror", None) or err
            raise SevhopError(f"cannot start {emulator}: {reason}", "correct that, then try again") from err
        finally:
            # Then the socket is closed when QEMU exits, and a client that waits to be accepted gets an error.
            listener.close()
            os.close(gate)
        self = cls(QemuProcess.open(child.pid), directory, child, log)
        try:
            try:
                if started is not None:
                    await started(self.process, directory)
                with contextlib.suppress(OSError):  # it has exited
                    os.write(opened, b"\0")
            finally:
                os.close(opened)
            if launch_context.identity is None:
                _place(child.pid, launch_context)
            # QEMU serves its monitors when it has created the machine.
            self.monitor = await Monitor.connect(directory / MONITOR, timeout=command_timeout, greeting_timeout=timeout)
        except MonitorError as err:
            killed = await self.process.wait(_JUST_ENDED)
            await self.kill()
            reason, hint = self.last_error(), ""
            if killed and child.returncode == -signal.SIGKILL:
                reason, hint = "it was killed, perhaps by the OOM killer", "see dmesg for why, then try again"
            elif killed and not reason:
                reason = f"it has exited with status {child.returncode}"
            elif not reason:
                reason, hint = err.message, "on a slow host, raise --start-timeout"
            raise SevhopError(f"the new QEMU did not start: {reason}", hint) from err
        except BaseException:
            await self.kill()
            raise
        return self

    def last_error(self) -> str:
        """The last line of :meth:`log_lines`; empty when there is none."""
        return log_lines[-1] if (log_lines := self.log_lines()) else ""

    def log_lines(self) -> list[str]:
        """What QEMU has printed to stderr until the hop was over, without warnings."""
        if self._log is None:
            return []
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines()]
        return [line for line in lines if line and "warning:" not in line]

    def protect(self, oom_score_adj: int, note: Callable[[str], None]) -> None:
        """It has the guest: it is no longer the first choice of the OOM killer."""
        try:
            launch.set_oom_score_adj(self.process.pid, oom_score_adj)
        except OSError as err:
            note(
                f"cannot set oom_score_adj of the new QEMU (process {self.process.pid}): {err.strerror}; set it to "
                f"{oom_score_adj}, or the OOM killer terminates it first"
            )

    async def kill(self) -> None:
        """
        Kill the destination, and wait until it has exited.

        :raises SevhopError: it still exists. The source must not run then.
        """
        if self._monitor is not None:
            await self._monitor.close()
        if self._child is not None:
            launch.kill_session(self._child)
        self.process.kill()
        gone = await self.process.wait(KILL_TIMEOUT)
        if not gone:
            hint = "it waits in the kernel, usually for storage: restore that, then run sevhop recover"
            raise SevhopError(f"cannot kill the new QEMU (process {self.process.pid})", hint)
        if self._child is not None:
            self._child.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    async def release(self) -> None:
        """Disconnect, and leave it running. Nobody can connect to this monitor any more."""
        await self.leave()
        shutil.rmtree(self.directory, ignore_errors=True)

    async def leave(self) -> None:
        """Disconnect, and leave it running, for another process to :meth:`reach`."""
        await self.monitor.close()
        self.process.close()
        if self._log is not None:
            self._log.close()


def _spawn(
    command: Sequence[str],
    launch_context: LaunchContext,
    environment: dict[str, str],
    *,
    stderr: int,
    gate: int,
    keep: Sequence[int],
) -> subprocess.Popen[bytes]:
    identity = launch_context.identity
    if identity is None:
        return subprocess.Popen(
            command,
            cwd=launch_context.working_directory,
            env=environment,
            umask=launch_context.credentials.umask,
            stdin=subprocess.DEVNULL,
            stdout=launch_context.stdout,
            stderr=stderr,
            pass_fds=keep,
            start_new_session=True,
        )
    own = launch_context.cgroups is not None
    cgroups = () if own else identity.confinement.cgroups_to_join()
    if launch_context.profile is not None:
        confinement = identity.confinement._replace(label=str(launch_context.profile.label))
        identity = identity._replace(confinement=confinement)
    return launch.spawn(
        command,
        environment,
        identity,
        directory=launch_context.directory,
        cgroups=cgroups,
        namespaces=launch_context.namespaces,
        keep=keep,
        gate=gate if own else None,
        stdout=launch_context.stdout,
        stderr=stderr,
    )


def _place(pid: int, launch_context: LaunchContext) -> None:
    """Give a process that runs as ourselves the limits of the source."""
    for number, limit in launch_context.limits.items():
        with contextlib.suppress(OSError, ValueError):
            resource.prlimit(pid, number, limit)
    with contextlib.suppress(OSError):
        launch.set_oom_score_adj(pid, launch.FIRST_TO_DIE)


def _duplicate_or_null(source: QemuProcess, number: int) -> int:
    """The source's standard output or error, so that the destination's messages go to the same place."""
    with contextlib.suppress(SevhopError):
        return source.duplicate(number)
    return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
