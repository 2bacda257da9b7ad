"""Hook calls that are passed on to a keeper: the real client, and a keeper that replies what the test wants."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sevhop.install import host
from sevhop.libvirt import hook_server
from sevhop.records.run_directory import listening
from sevhop_qmp.peer import peer_credentials

from .hooked_domain import DESTINATION, IMAGE, UUID, XML

#: Run by the client where no keeper listens.
INSTEAD = ("/bin/sh", "-c", 'echo "instead $*"; cat', "sh")
CALL = ("web", "restore", "begin", "-")


class FakeKeeper:
    """Its requests and the processes that sent them, and its reply."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.asked: list[str] = []
        self.callers: list[int] = []
        self.answer = "ok"

    @contextlib.asynccontextmanager
    async def alive(self) -> AsyncIterator[None]:
        with listening(self.directory / hook_server.SOCKET, os.geteuid()) as listener:
            task = asyncio.ensure_future(hook_server.listen(listener, self._answer))
            yield
            task.cancel()
            await asyncio.wait({task})

    async def _answer(self, sock: socket.socket, request: str) -> str:
        self.asked.append(request)
        self.callers.append(peer_credentials(sock)[0])
        return self.answer


async def call(directory: Path, *arguments: str, xml: str = XML) -> tuple[int, str, str, int]:
    """Exit status, output, reason, and the pid that the client had."""
    process = await asyncio.create_subprocess_exec(
        hook_server.CLIENT,
        directory,
        *INSTEAD,
        *arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        out, err = await process.communicate(xml.encode())
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode(), process.pid


@pytest.fixture
def keeper(tmp_path: Path) -> FakeKeeper:
    return FakeKeeper(tmp_path)


def test_call_returns_the_reply_of_the_keeper(keeper: FakeKeeper) -> None:
    async def work() -> None:
        async with keeper.alive():
            status, out, err, pid = await call(keeper.directory, *CALL, xml=IMAGE)
            assert (status, out, err) == (0, DESTINATION, "")
            assert keeper.asked == [f"hook restore begin {UUID}"]
            assert keeper.callers == [pid]  # whose parent libvirt is
            keeper.answer = "error it is too early"
            assert (await call(keeper.directory, *CALL))[:3] == (1, "", "sevhop: it is too early\n")
            assert (await call(keeper.directory, "web", "stopped", "end", "-"))[:3] == (0, "", "")

    asyncio.run(work())


def test_calls_are_served_in_parallel(keeper: FakeKeeper) -> None:
    async def work() -> None:
        async with keeper.alive():
            calls = [call(keeper.directory, f"web {n}", "started", "begin", "-") for n in range(10)]
            assert [answer[:3] for answer in await asyncio.gather(*calls)] == [(0, "", "")] * 10
        assert len(keeper.asked) == 10

    asyncio.run(work())


def test_xml_may_be_larger_than_a_pipe(keeper: FakeKeeper) -> None:
    async def work() -> None:
        async with keeper.alive():
            xml = IMAGE.replace("<name>", f"<description>{'x' * 300_000}</description><name>")
            status, out, _, _ = await call(keeper.directory, *CALL, xml=xml)
            assert (status, out) == (0, xml.replace("SEVHOP_IMAGE", "SEVHOP_RESTORED"))

    asyncio.run(work())


def test_hook_script_runs_the_client(keeper: FakeKeeper, tmp_path: Path) -> None:
    """As libvirt calls it."""
    domains = tmp_path / "domains"
    domains.mkdir()
    (domains / "web").symlink_to(keeper.directory)
    script = tmp_path / "script"
    script.write_text(host.hook_script(python="/bin/false").replace("/run/sevhop/domains", str(domains)))
    script.chmod(0o755)

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run([script, *CALL], input=IMAGE, capture_output=True, text=True, check=False)

    async def work() -> None:
        async with keeper.alive():
            done = await asyncio.to_thread(run)
        assert (done.returncode, done.stdout, done.stderr) == (0, DESTINATION, "")

    asyncio.run(work())


@pytest.mark.parametrize("arguments", [CALL, ("x" * 5000, "restore", "begin", "-"), ("", "", "", "")])
def test_command_is_run_without_a_keeper(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """With all of its input."""
    status, out, err, _ = asyncio.run(call(tmp_path / "nobody", *arguments))
    assert (status, out, err) == (0, f"instead {' '.join(arguments)}\n{XML}", "")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(tmp_path / hook_server.SOCKET))
    assert asyncio.run(call(tmp_path, *arguments))[1] == out


def test_call_is_refused_if_the_keeper_exits_during_it(keeper: FakeKeeper) -> None:
    """It may have read the XML, so nobody else can reply."""

    async def work() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(keeper.directory / hook_server.SOCKET))
            listener.listen()
            calling = asyncio.ensure_future(call(keeper.directory, *CALL))
            sock, _ = await asyncio.to_thread(listener.accept)
            sock.recv(1)
            sock.close()
            status, out, err, _ = await calling
        assert (status, out, err) == (1, "", "sevhop: the keeper of domain web did not reply: try again\n")

    asyncio.run(work())


@pytest.mark.parametrize("descriptors", [0, 1])
def test_call_without_its_streams_is_not_served(keeper: FakeKeeper, descriptors: int) -> None:
    async def work() -> None:
        async with keeper.alive():
            before = set(os.listdir("/proc/self/fd"))
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.connect(str(keeper.directory / hook_server.SOCKET))
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{descriptors}i", *[0] * descriptors))
                sock.sendmsg([b"\0".join(argument.encode() for argument in CALL)], [rights] if descriptors else [])
                assert await asyncio.to_thread(sock.recv, 1) == b""
            assert set(os.listdir("/proc/self/fd")) <= before
            assert keeper.asked == []
            assert (await call(keeper.directory, *CALL))[0] == 0

    asyncio.run(work())
