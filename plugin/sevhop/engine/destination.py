"""
The destination: a new QEMU process that looks, to the system, like the one it replaces.

It gets the source's user, working directory, environment, and whatever else confines or favours the source
(:mod:`sevhop.process.confinement`, :mod:`sevhop.process.scheduling`), so that relative paths, permissions and
accounting stay what they were, and adopt.so, so that it adopts instead of launching. It waits for a stream; until that
has come to its end nothing of it runs.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from sevhop_qmp import adopt
from sevhop_qmp.errors import MonitorError, SevhopError
from sevhop_qmp.monitor import COMMAND_TIMEOUT, Monitor
from sevhop_qmp.process import Credentials, QemuProcess

from ..guest import command_line
from ..keeper.handover import Keeper
from ..process import launch
from ..process.confinement import Confinement
from ..process.launch import Identity
from ..process.scheduling import Thread
from ..records import run_directory

#: Seconds until a new QEMU must answer its monitor.
START_TIMEOUT = 30.0
#: Seconds until a killed process must be gone.
KILL_TIMEOUT = 10.0
#: Seconds in which a QEMU has ended that has hung up.
_JUST_ENDED = 0.2

#: Name of the monitor's socket in the directory of the hop.
_MONITOR = "monitor"


@dataclass(frozen=True)
class Surroundings:
    """
    What the source lives in and the destination gets: kept, because the source may have ended when it is needed.

    :ivar stdout: a duplicate of its standard output; the same for ``stderr``.
    :ivar identity: what the destination takes on; None for one that starts as ourselves.
    :ivar directory: descriptor of the working directory; None for one that starts as ourselves.
    """

    credentials: Credentials
    working_directory: str
    environment: dict[str, str]
    limits: dict[int, tuple[int, int]]
    stdout: int
    stderr: int
    identity: Identity | None = None
    directory: int | None = None

    @classmethod
    def of(cls, source: QemuProcess) -> Self:
        """:raises ProcessError: the source has ended, or we may not look."""
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
        """Let go of the descriptors."""
        for descriptor in (self.stdout, self.stderr, self.directory):
            if descriptor is not None:
                os.close(descriptor)


class Destination:
    """
    A started destination. :meth:`start`, then either let it live (:meth:`release`) or :meth:`kill` it.

    It is our child, in a session of its own. When we end, init takes it over; a caller that lives on may wait for it.

    :ivar directory: of its own, below ``/run/sevhop``; its monitor is there, so that another process can reach it
        should this one end. It goes away when the destination is let live or has been killed.
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
        self.monitor: Monitor

    @classmethod
    async def reach(cls, process: QemuProcess, directory: Path, *, timeout: float = COMMAND_TIMEOUT) -> Self:
        """
        Connect to a destination that another process has started.

        :raises MonitorError: it does not answer.
        """
        self = cls(process, directory)
        self.monitor = await Monitor.connect(directory / _MONITOR, timeout=timeout, greeting_timeout=timeout)
        if self.monitor.peer != process.pid:
            await self.monitor.close()
            raise MonitorError(f"{directory / _MONITOR} is not served by process {process.pid}")
        return self

    @classmethod
    async def start(
        cls,
        emulator: str,
        arguments: Sequence[str],
        surroundings: Surroundings,
        keeper: Keeper,
        *,
        timeout: float = START_TIMEOUT,
        command_timeout: float = COMMAND_TIMEOUT,
        started: Callable[[QemuProcess, Path], None] = lambda process, directory: None,
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
        :param started: told, as soon as there is a process, of it and of the directory in which its monitor will be.
        :param directory: to be made for its monitor; by default one that nobody can guess.
        :param within: what stands in front of the command: a program that executes it in another place.
        :param keep: descriptors that it inherits.
        :param paused: whether it stays paused when it has all of the guest; otherwise it lets the guest run.
        :raises SevhopError: it did not come up; the message has QEMU's own reason when it gave one.
        """
        if directory is None:
            directory = run_directory.make()
        else:
            directory.mkdir(mode=0o700)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # What QEMU says while it starts is needed for a reason; later it goes where the source's messages went.
        log = os.fdopen(os.memfd_create("sevhop-destination-log"), "r+b")
        environment = dict(surroundings.environment)
        environment |= adopt.environment(f"fd:{keeper.theirs.fileno()}", surroundings.stderr, inherited=environment)
        try:
            listener.bind(str(directory / _MONITOR))
            listener.listen()
            child = _spawn(
                [*within, emulator, *command_line.incoming(list(arguments), listener.fileno(), paused=paused)],
                surroundings,
                environment,
                stderr=log.fileno(),
                keep=[listener.fileno(), keeper.theirs.fileno(), surroundings.stderr, *keep],
            )
        except (OSError, subprocess.SubprocessError) as err:
            log.close()
            shutil.rmtree(directory, ignore_errors=True)
            raise SevhopError(f"{emulator} cannot be started: {getattr(err, 'strerror', None) or err}") from err
        finally:
            # When QEMU ends, nobody listens any more, and whoever waits to be accepted is told so.
            listener.close()
        self = cls(QemuProcess.open(child.pid), directory, child, log)
        try:
            started(self.process, directory)
            if surroundings.identity is None:
                _place(child.pid, surroundings)
            # QEMU serves its monitors when it has built the machine.
            self.monitor = await Monitor.connect(
                directory / _MONITOR, timeout=command_timeout, greeting_timeout=timeout
            )
        except MonitorError as err:
            killed = await self.process.wait(_JUST_ENDED)
            await self.kill()
            reason = self.last_words() or err.message
            if killed and child.returncode == -signal.SIGKILL:
                reason = "it was killed, by somebody or because memory is out"
            raise SevhopError(f"the destination did not start: {reason}") from err
        except BaseException:
            await self.kill()
            raise
        return self

    def last_words(self) -> str:
        """The last thing QEMU said while it was ours, in one line; empty when it said nothing."""
        return said[-1] if (said := self.said()) else ""

    def said(self) -> list[str]:
        """What QEMU said while it was ours, line by line, but for warnings."""
        if self._log is None:
            return []
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines()]
        return [line for line in lines if line and "warning:" not in line]

    def protect(self, oom_score_adj: int, note: Callable[[str], None]) -> None:
        """It has the guest: it is not the first any more to be ended when memory is out."""
        try:
            launch.set_oom_score_adj(self.process.pid, oom_score_adj)
        except OSError as err:
            note(f"oom_score_adj of process {self.process.pid} is still {launch.FIRST_TO_DIE}: {err.strerror}")

    async def kill(self) -> None:
        """
        End the destination and see that it has ended.

        :raises SevhopError: it is still there. The source must not run then.
        """
        if hasattr(self, "monitor"):
            await self.monitor.close()
        self.process.kill()
        gone = await self.process.wait(KILL_TIMEOUT)
        if not gone:
            raise SevhopError(f"the destination (process {self.process.pid}) cannot be killed")
        if self._child is not None:
            self._child.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    async def release(self) -> None:
        """Hang up and let it live on. Nobody can reach this monitor any more."""
        await self.leave()
        shutil.rmtree(self.directory, ignore_errors=True)

    async def leave(self) -> None:
        """Hang up and let it live on, for somebody else to :meth:`reach`."""
        await self.monitor.close()
        self.process.close()
        if self._log is not None:
            self._log.close()


def _spawn(
    command: Sequence[str],
    surroundings: Surroundings,
    environment: dict[str, str],
    *,
    stderr: int,
    keep: Sequence[int],
) -> subprocess.Popen[bytes]:
    identity = surroundings.identity
    if identity is None:
        return subprocess.Popen(
            command,
            cwd=surroundings.working_directory,
            env=environment,
            umask=surroundings.credentials.umask,
            stdin=subprocess.DEVNULL,
            stdout=surroundings.stdout,
            stderr=stderr,
            pass_fds=keep,
            start_new_session=True,
        )
    return launch.spawn(
        command,
        environment,
        identity,
        directory=surroundings.directory,
        cgroups=identity.confinement.cgroups_to_join(),
        keep=keep,
        stdout=surroundings.stdout,
        stderr=stderr,
    )


def _place(pid: int, surroundings: Surroundings) -> None:
    """Give a process that has started as ourselves the limits of the source."""
    for number, limit in surroundings.limits.items():
        with contextlib.suppress(OSError, ValueError):
            resource.prlimit(pid, number, limit)
    with contextlib.suppress(OSError):
        launch.set_oom_score_adj(pid, launch.FIRST_TO_DIE)


def _duplicate_or_null(source: QemuProcess, number: int) -> int:
    """The source's standard output or error, so that the guest's messages go on in the same place."""
    with contextlib.suppress(SevhopError):
        return source.duplicate(number)
    return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
