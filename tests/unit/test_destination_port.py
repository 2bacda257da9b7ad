"""The connection of a destination to which a guest hops from the transit."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from sevhop.guest.inspection import SevContext
from sevhop.keeper.handover import HandoverProtocol, SourceHandles
from sevhop.transit_keeper.port import DestinationPort


def with_port(path: Path, use: Callable[[DestinationPort, socket.socket], Awaitable[None]]) -> None:
    """Use a port from its other end."""

    async def main() -> None:
        read_end, write_end = os.pipe()
        protocol = HandoverProtocol(SourceHandles(None, {}), SevContext("none"))
        port = DestinationPort(protocol, read_end, path, lambda: None)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                port.accept(ours)
                await use(port, theirs)
        finally:
            port.close()
            os.close(read_end)
            os.close(write_end)

    asyncio.run(main())


async def ask(sock: socket.socket, request: bytes) -> tuple[str, list[int]]:
    sock.settimeout(10)
    sock.send(request)
    text, fds, _, _ = await asyncio.to_thread(socket.recv_fds, sock, 4096, 4)
    return text.decode(), fds


def test_stream_takes_the_place_of_the_save_image(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.touch()

    async def use(port: DestinationPort, sock: socket.socket) -> None:
        assert (await ask(sock, b"hello 1"))[0] == "ok context=none source=running"
        assert port.peer == os.getpid()
        text, (fd,) = await ask(sock, b"stream")
        stat = image.stat()
        assert text == f"fd {stat.st_dev} {stat.st_ino}"
        assert os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:")
        os.close(fd)

    with_port(image, use)


def test_stream_is_refused_without_an_image(tmp_path: Path) -> None:
    async def use(port: DestinationPort, sock: socket.socket) -> None:
        assert (await ask(sock, b"stream"))[0].startswith("error the save image is gone: ")

    with_port(tmp_path / "image", use)


@pytest.mark.parametrize("reported", [True, False])
def test_start_is_reported_or_revoked(tmp_path: Path, reported: bool) -> None:
    async def use(port: DestinationPort, sock: socket.socket) -> None:
        await ask(sock, b"hello 1")
        if reported:
            sock.send(b"run")
        assert port.revoke_start() == reported
        if not reported:
            with pytest.raises(OSError):
                sock.send(b"run")

    with_port(tmp_path, use)


def test_process_that_asks_nothing_is_not_the_destination(tmp_path: Path) -> None:
    async def use(port: DestinationPort, sock: socket.socket) -> None:
        sock.shutdown(socket.SHUT_RDWR)
        await asyncio.sleep(0)
        assert port.peer == 0

    with_port(tmp_path, use)
