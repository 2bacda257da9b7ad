"""The command's side of a keeper: starting it, and sending it requests. It is in :mod:`sevhop.keeper.main`."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Self

from ..libvirt import domain_xml
from ..libvirt.hook import transit_of
from ..process import host_shutdown, systemd
from ..records.run_directory import alive, hop_of, remove
from .config import MESSAGE, KeeperConfig, KeeperError, KeeperTimeout
from .paths import KeeperPaths

log = logging.getLogger(__name__)

#: Seconds within which a new keeper must have taken everything.
START_TIMEOUT = 120.0
#: Seconds within which it must reply. A commit may retry for seconds.
ANSWER_TIMEOUT = 30.0
_TRY_AGAIN = "try again; the system log may have the reason"
_RECOVER = "run: sevhop recover"
_HANGS = f"{_RECOVER}; if that meets the same, kill the process sevhop-keeper, not its supervisor, and run it again"


class KeeperClient:
    """
    A keeper that was started, and the connection to it.

    :ivar directory: its own; the save image goes there, too.
    :ivar timeout: seconds within which it must reply. It is set to less while the guest is stopped.
    """

    def __init__(self, directory: Path, control: socket.socket) -> None:
        self.directory = directory
        self.timeout = ANSWER_TIMEOUT
        self._paths = KeeperPaths(directory)
        self._control = control
        self._unanswered = False
        self._abandoned: list[socket.socket] = []

    @classmethod
    async def start(cls, config: KeeperConfig) -> Self:
        """
        Start a keeper and have it take everything from the source.

        :raises KeeperError: it could not, or there is one for this domain already.
        """
        # Not asyncio's subprocess: that one kills its child when the loop is closed, and this child must outlive us.
        process = subprocess.Popen(
            _command() if config.transit is None else _command("sevhop.transit_keeper.main", config.transit.cgroups),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            with process.stdin, process.stdout:
                process.stdin.write(config.as_json().encode())
                process.stdin.close()
                async with asyncio.timeout(START_TIMEOUT):
                    line = await asyncio.to_thread(_first_line, process.stdout)
        except (TimeoutError, OSError) as err:
            process.kill()
            process.wait()
            left = hop_of(config.name)
            if left is not None and not alive(left) and not transit_of(str(left)):
                remove(config.name, left)
            raise KeeperError(
                f"cannot start the keeper: it did not answer within {START_TIMEOUT:g} s", _TRY_AGAIN
            ) from err
        if not line.startswith("ready "):
            raise KeeperError(line or "cannot start the keeper: it has exited", "" if line else _TRY_AGAIN)
        self = await cls.connect(Path(line.removeprefix("ready ")))
        await self.status()
        return self

    @classmethod
    async def connect(cls, directory: Path) -> Self:
        """:raises KeeperError: no keeper listens there."""
        return cls(directory, await _connect(directory))

    def close(self) -> None:
        """Disconnect. The keeper keeps running for as long as the guest needs it."""
        for sock in (self._control, *self._abandoned):
            sock.close()

    @property
    def image(self) -> Path:
        """Where the save image is written."""
        return self._paths.image

    @property
    def socket(self) -> Path:
        """Where adopt.so connects."""
        return self._paths.keeper

    @property
    def monitor(self) -> Path:
        """Where the destination opens a monitor for the keeper."""
        return self._paths.monitor

    def has_started(self, pid: int) -> bool:
        """Whether libvirt has started this QEMU from the image: then it opens the keeper's monitor."""
        with contextlib.suppress(OSError):
            variable = f"{domain_xml.MONITOR}={self.monitor}"
            return os.fsencode(variable) in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return False

    async def keep_blocks(self) -> None:
        """The source has stopped: copy those RAM blocks that are private to it."""
        await self._ask("blocks")

    async def retire(self) -> None:
        """
        The image is complete: terminate the source. From then on the domain may be restored.

        :raises KeeperError: the source cannot be terminated, or somebody has resumed the guest. Then nothing changes.
        """
        await self._ask("retire")

    async def use(self, emulator: str) -> None:
        """Have the next restore use this emulator."""
        await self._ask(f"emulator {emulator}")

    async def revoke(self) -> None:
        """
        Whoever restores the domain now cannot let the guest run any more: its destination may be terminated.

        :raises KeeperError: it is too late for that.
        """
        await self._ask("revoke")

    async def status(self) -> dict[str, Any]:
        """Its state, and what has happened so far."""
        try:
            answer: dict[str, Any] = json.loads(await self._ask("status"))
        except ValueError as err:
            raise KeeperError("cannot read the state of the keeper: invalid reply", _RECOVER) from err
        return answer

    async def release(self) -> None:
        """Have it release everything and exit. A guest that does not run anywhere is lost then."""
        with contextlib.suppress(KeeperError, OSError):
            await self._ask("release")
            async with asyncio.timeout(self.timeout):
                await asyncio.get_running_loop().sock_recv(self._control, 1)

    async def _ask(self, request: str) -> str:
        """Send a request; if the keeper has died meanwhile, send it to the next one. Every request is idempotent."""
        try:
            try:
                answer = await self._exchange(request)
            except ConnectionError:
                self._control.close()
                self._control = await _connect(self.directory)
                self._unanswered = False
                answer = await self._exchange(request)
        except TimeoutError as err:
            raise KeeperTimeout(f"the keeper did not reply within {self.timeout:g} s", _HANGS) from err
        except OSError as err:
            raise KeeperError("the keeper is gone", _RECOVER) from err
        verdict, _, rest = answer.partition(" ")
        if verdict != "ok":
            raise KeeperError(rest or "the keeper is gone", "" if rest else _RECOVER)
        return rest

    async def _exchange(self, request: str) -> str:
        loop = asyncio.get_running_loop()
        if self._unanswered:
            # The reply that was not waited for may come yet, and must not be taken for that to this request. The
            # connection stays open: to the keeper, the command goes away with it.
            again = await _connect(self.directory)
            self._abandoned.append(self._control)
            self._control, self._unanswered = again, False
        self._unanswered = True
        async with asyncio.timeout(self.timeout):
            await loop.sock_sendall(self._control, request.encode())
            answer = await loop.sock_recv(self._control, MESSAGE)
        self._unanswered = False
        if not answer:
            raise ConnectionResetError(errno.ECONNRESET, "the keeper hung up")
        return answer.decode(errors="replace")


async def _connect(directory: Path) -> socket.socket:
    """:raises KeeperError: no keeper listens there."""
    control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(control, str(KeeperPaths(directory).control))
    except OSError as err:
        control.close()
        raise KeeperError(f"the keeper in {directory} is gone", _RECOVER) from err
    return control


def _command(module: str = "sevhop.keeper.main", cgroups: Sequence[str] = ()) -> list[str]:
    """
    What starts a keeper. Where systemd runs it gets a scope of its own, so that it is not terminated with the login
    session or the service that the command belongs to.

    :param module: its program.
    :param cgroups: of a transit, which is stopped after the keeper when the host shuts down.
    """
    keeper = [sys.executable, "-m", module]
    systemd_run = shutil.which("systemd-run")
    if not systemd.manages_host() or systemd_run is None:
        return keeper
    unit = f"--unit=sevhop-keeper-{secrets.token_hex(8)}"
    description = "--description=sevhop keeper: has the memory of a guest whose QEMU is being replaced"
    properties = [f"Before={unit}" for unit in host_shutdown.BEFORE]
    if scopes := sorted({Path(group).name for group in cgroups}):
        properties += [f"TimeoutStopSec={host_shutdown.PATIENCE}", *(f"After={name}" for name in scopes)]
    ordered = [f"--property={text}" for text in properties]
    return [systemd_run, "--scope", "--quiet", "--collect", unit, description, *ordered, "--", *keeper]


def _first_line(file: IO[bytes]) -> str:
    return file.readline().decode().strip()
