"""``sevhop hop`` probes the emulator while the rest of it is imported, if the guest's QEMU is known by then."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sevhop.cli import hop, terminal
from sevhop.engine import check
from sevhop.errors import GuestLost, Refused
from sevhop.guest import preload
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess

from tests.support.guests.running import wait_until

GREETING = b'{"QMP": {"version": {}}}\r\n'


@pytest.fixture
def server(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "monitor"))
        listener.listen()
        yield listener


def options(
    server: socket.socket, emulator: str | None = None, destination: tuple[str, ...] = ()
) -> argparse.Namespace:
    return argparse.Namespace(qmp=Path(server.getsockname()), emulator=emulator, destination=list(destination))


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """The processes for which an emulator was probed, and that."""
    calls: list[tuple[int, str]] = []

    def probe_for(process: QemuProcess, path: str) -> None:
        calls.append((process.pid, path))
        raise SevhopError("it is not trusted")

    monkeypatch.setattr(preload, "probe_for", probe_for)
    return calls


def greet(server: socket.socket, greeting: bytes) -> threading.Thread:
    def serve() -> None:
        client, _ = server.accept()
        with client, contextlib.suppress(ConnectionResetError):
            client.sendall(greeting)
            client.recv(1)  # until it hangs up

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("given", "emulator"),
    [
        ((None, ()), os.path.realpath(sys.executable)),
        (("/usr/bin/new", ()), "/usr/bin/new"),
        ((None, ("/usr/bin/whole", "-machine", "q35")), "/usr/bin/whole"),
    ],
    ids=["its own", "named", "whole command line"],
)
def test_emulator_is_probed_for_the_process_that_greets(
    given: tuple[str | None, tuple[str, ...]], emulator: str, server: socket.socket, probed: list[tuple[int, str]]
) -> None:
    serving = greet(server, GREETING)
    with hop._probing(options(server, *given)) as connection:
        assert connection is not None
    # What fails is the check's to report, and the greeting is there for who negotiates.
    assert probed == [(os.getpid(), emulator)]
    assert connection.recv(64) == GREETING
    connection.close()
    serving.join()


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH\r\n", b'{"QM', b""], ids=["SSH", "part", "nothing"])
def test_program_of_what_is_no_monitor_is_not_started(
    greeting: bytes, server: socket.socket, probed: list[tuple[int, str]]
) -> None:
    """It would be: the emulator is the guest's own by default."""
    serving = greet(server, greeting)
    with hop._probing(options(server)) as connection:
        assert connection is not None
    assert probed == []
    connection.close()
    serving.join()


def test_socket_without_listener_is_left_to_the_check(server: socket.socket, probed: list[tuple[int, str]]) -> None:
    server.close()
    missing = argparse.Namespace(qmp=Path("/nonexistent/monitor"), emulator=None, destination=[])
    with hop._probing(missing) as connection:
        assert connection is None
    assert probed == []


def test_monitor_may_have_a_large_number(server: socket.socket) -> None:
    """Many descriptors were inherited from a service, say: select(2) takes none above 1023."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    serving = greet(server, GREETING)
    try:
        with socket.socket(socket.AF_UNIX) as low:
            low.connect(server.getsockname())
            with socket.socket(fileno=fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 1100)) as connection:
                assert hop._greets(connection)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        serving.join()


@pytest.mark.parametrize("early", [True, False], ids=["before it starts", "while it runs"])
def test_interrupt_ends_a_probe_that_hangs(early: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be waited for, for a minute, as for an emulator on a host that is busy."""
    monkeypatch.setattr(preload, "_abandoned", early)
    emulator = tmp_path / "qemu"
    emulator.write_text(f"#!/bin/sh\necho >{tmp_path}/runs\nsleep 60\n")
    emulator.chmod(0o755)
    own = QemuProcess.open(os.getpid())
    errors: list[str] = []

    def probe() -> None:
        try:
            preload.probe_for(own, str(emulator))
        except SevhopError as err:
            errors.append(err.message)

    thread = threading.Thread(target=probe)
    thread.start()
    if not early:
        wait_until((tmp_path / "runs").exists, 10, "it runs")
        preload.abandon()
    thread.join(10)
    assert errors == [f"{emulator} is not a QEMU system emulator"]
    own.close()


def test_little_is_imported_before_the_probe() -> None:
    """It lasts as long as importing asyncio and the engine."""
    script = "import sys, sevhop.cli.commands, sevhop.cli.hop; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert imported.isdisjoint({"asyncio", "qemu.qmp", "tenacity", "ssl", "sevhop.api"})
    assert not [name for name in imported if name.startswith("sevhop.engine")]


@pytest.fixture
def interrupts() -> Iterator[Callable[[Any], None]]:
    """Sets what SIGINT does, until the end of the test."""
    before = signal.getsignal(signal.SIGINT)

    def install(handler: Any) -> None:
        signal.signal(signal.SIGINT, handler)

    yield install
    signal.signal(signal.SIGINT, before)


def test_interrupt_takes_effect_when_all_is_imported(interrupts: Callable[[Any], None]) -> None:
    """Otherwise who reports it would import what is half imported."""
    interrupts(signal.default_int_handler)
    reached: list[None] = []
    with pytest.raises(KeyboardInterrupt), terminal.deferred_interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(None)
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signal_that_ends_a_session_is_an_interrupt_from_the_start() -> None:
    """Otherwise what was started by then, such as the emulator for a probe, is left."""
    script = "import os, signal, sys; from sevhop.cli import interruptible, terminal; import asyncio\n"
    script += "signal.signal(int(sys.argv[1]), lambda *_: sys.exit('not deferred'))\n"  # it may be ignored here
    script += "try:\n  with terminal.deferred_interrupts(): os.kill(os.getpid(), int(sys.argv[1]))\n"
    script += "except KeyboardInterrupt: print('deferred')\n"
    script += "async def work(): await asyncio.sleep(60)\n"
    script += "handle = terminal.handle_signals\n"
    script += "def late(*a, **k): os.kill(os.getpid(), int(sys.argv[1])); handle(*a, **k)\n"
    script += "terminal.handle_signals = late\n"
    script += "print(interruptible.run(work()))"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        command = [sys.executable, "-W", "ignore", "-c", script, str(int(number))]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        assert (done.stdout.split(), done.stderr) == (["deferred", "None"], ""), number


def test_ignored_interrupt_stays_ignored(interrupts: Callable[[Any], None]) -> None:
    """As for a command in the background of a script."""
    interrupts(signal.SIG_IGN)
    with terminal.deferred_interrupts():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_source_that_was_replaced_meanwhile_is_not_lost(server: socket.socket) -> None:
    """Another command has the guest hop, and has not left a record any more."""
    ended: Any = SimpleNamespace(lives_on=lambda: asyncio.sleep(0, False))
    path = Path(server.getsockname())
    with pytest.raises(Refused, match="another QEMU serves that socket now"):
        asyncio.run(check._verify_not_lost(ended, path))
    server.close()
    with pytest.raises(GuestLost):
        asyncio.run(check._verify_not_lost(ended, path))
