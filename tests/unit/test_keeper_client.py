"""The command's side of the keeper: how one is started, and requests when keepers die."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sevhop.keeper import client as keeper_client
from sevhop.keeper.client import KeeperClient
from sevhop.keeper.config import KeeperError, KeeperTimeout
from sevhop.process import systemd


@contextmanager
def keepers(directory: Path, dying: int) -> Iterator[list[str]]:
    """Keepers that serve one socket, one after the other; so many die of their first request. What they received."""
    received: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(directory / "control"))
        listener.listen()

        def serve() -> None:
            for number in range(dying + 1):
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                with sock:
                    while request := sock.recv(4096).decode():
                        received.append(request)
                        if number < dying:
                            break
                        sock.send(b"error thanks" if request == "blocks" else b"ok " + json.dumps({"a": 1}).encode())

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield received
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


async def with_keeper(directory: Path, work: Callable[[KeeperClient], Coroutine[Any, Any, Any]]) -> Any:
    keeper = await KeeperClient.connect(directory)
    try:
        return await work(keeper)
    finally:
        keeper.close()


def test_request_is_repeated_when_a_keeper_dies(tmp_path: Path) -> None:
    with keepers(tmp_path, 1) as received:
        assert asyncio.run(with_keeper(tmp_path, KeeperClient.status)) == {"a": 1}
    assert received == ["status", "status"]


def test_refused_request_is_not_repeated(tmp_path: Path) -> None:
    with keepers(tmp_path, 0) as received, pytest.raises(KeeperError, match="thanks"):
        asyncio.run(with_keeper(tmp_path, KeeperClient.keep_blocks))
    assert received == ["blocks"]


def test_request_is_repeated_once(tmp_path: Path) -> None:
    with keepers(tmp_path, 2) as received, pytest.raises(KeeperError, match="the keeper is gone"):
        asyncio.run(with_keeper(tmp_path, KeeperClient.retire))
    assert received == ["retire", "retire"]


def test_keeper_that_is_gone_is_reported(tmp_path: Path) -> None:
    async def work(keeper: KeeperClient) -> None:
        (tmp_path / "control").unlink()
        await keeper.retire()

    with keepers(tmp_path, 1), pytest.raises(KeeperError, match="is gone"):
        asyncio.run(with_keeper(tmp_path, work))


def test_late_reply_is_not_taken_for_that_to_the_next_request(tmp_path: Path) -> None:
    """
    A keeper that was halted replies to both. A command that takes the first reply for "it is revoked" would terminate
    a QEMU that has the guest.
    """
    connections: list[socket.socket] = []

    def serve(listener: socket.socket) -> None:
        first, _ = listener.accept()
        connections.append(first)
        assert first.recv(4096) == b"status"
        second, _ = listener.accept()
        connections.append(second)
        first.send(b"ok {}")
        assert second.recv(4096) == b"revoke"
        second.send(b"error the guest has run")

    async def work(keeper: KeeperClient) -> None:
        keeper.timeout = 0.05
        with pytest.raises(KeeperTimeout):
            await keeper.status()
        keeper.timeout = 10
        with pytest.raises(KeeperError, match="the guest has run"):
            await keeper.revoke()
        # To the keeper, the command is still there.
        with pytest.raises(BlockingIOError):
            connections[0].recv(1, socket.MSG_DONTWAIT)

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "control"))
        listener.listen()
        listener.settimeout(10)
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            asyncio.run(with_keeper(tmp_path, work))
        finally:
            thread.join()
            for sock in connections:
                with sock, contextlib.suppress(ConnectionResetError):  # the late reply was not read
                    assert not sock.recv(1), "it is closed in the end"


def test_keeper_has_only_a_session_without_systemd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(systemd, "BOOTED", tmp_path / "missing")
    assert keeper_client._command() == [sys.executable, "-m", "sevhop.keeper.main"]


def test_keeper_has_a_scope_of_its_own_under_systemd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "systemd-run"
    program.touch(mode=0o755)
    monkeypatch.setattr(systemd, "BOOTED", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    first, second = keeper_client._command(), keeper_client._command()
    assert first[:4] == [str(program), "--scope", "--quiet", "--collect"]
    assert first[4].startswith("--unit=sevhop-keeper-")
    assert first[4] != second[4]
    assert first[first.index("--") + 1 :] == [sys.executable, "-m", "sevhop.keeper.main"]


def test_keeper_is_stopped_before_its_transit_when_the_host_shuts_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And after libvirt-guests, and after the service in which an upgrade may be in progress."""
    (tmp_path / "systemd-run").touch(mode=0o755)
    monkeypatch.setattr(systemd, "BOOTED", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    groups = ["/sys/fs/cgroup/cpu/machine.slice/one.scope", "/sys/fs/cgroup/pids/machine.slice/one.scope"]
    found = [word for word in keeper_client._command("a.keeper", groups) if word.startswith("--property=")]
    assert found == [
        "--property=Before=virt-guest-shutdown.target",
        "--property=Before=sevhop-upgrade.service",
        "--property=TimeoutStopSec=300",
        "--property=After=one.scope",
    ]
