"""Calls to libvirt, as far as they can be tested without one."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time

import libvirt
import libvirt_qemu
import pytest
from sevhop.libvirt import daemon
from sevhop.libvirt.domain_monitor import DomainMonitor
from sevhop_qmp.errors import MonitorTimeout


def test_cancellation_is_kept_if_it_arrives_with_the_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not be lost, or a hop that somebody asked to roll back would continue."""

    async def interrupted() -> bool:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[str] = loop.create_future()
        monkeypatch.setattr(loop, "run_in_executor", lambda *_: answer)
        call = asyncio.ensure_future(daemon.call(str))
        await asyncio.sleep(0)
        answer.set_result("done")
        call.cancel()
        await asyncio.wait({call})
        return call.cancelled()

    assert asyncio.run(interrupted())


def test_reply_is_kept_if_this_process_did_not_run_for_longer_than_the_timeout() -> None:
    """One that was stopped, or got no processor: its timers have expired, although libvirt replies."""

    async def stopped() -> str:
        asyncio.get_running_loop().call_later(0.01, time.sleep, 1.0)
        return str(await daemon.in_thread(0.5, lambda: time.sleep(1.1) or "reply"))  # type: ignore[func-returns-value]

    assert asyncio.run(stopped()) == "reply"


HOOK_FAILED = (
    "Hook script execution failed: internal error: Child process (LC_ALL=C PATH=/usr/sbin:/usr/bin HOME=/root "
    "/etc/libvirt/hooks/qemu.d/50-inventory web prepare begin -) unexpected "
)


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            f"{HOOK_FAILED}exit status 1: inventory: in maintenance: call 4711\n",
            "the hook /etc/libvirt/hooks/qemu.d/50-inventory has failed (exit status 1): inventory: in maintenance: "
            "call 4711",
        ),
        (f"{HOOK_FAILED}exit status 3", "the hook /etc/libvirt/hooks/qemu.d/50-inventory has failed (exit status 3)"),
        (
            f"{HOOK_FAILED}fatal signal 15: ",
            "the hook /etc/libvirt/hooks/qemu.d/50-inventory has failed (fatal signal 15)",
        ),
        ("qemu has exited: \nfirst\n  second\n", "qemu has exited:; first; second"),
        ("Hook script execution failed: no such file", "Hook script execution failed: no such file"),
    ],
)
def test_error_of_libvirt_is_one_line_with_the_reason(message: str, line: str) -> None:
    def failing() -> None:
        error = libvirt.libvirtError(message)
        error.err = (libvirt.VIR_ERR_HOOK_SCRIPT_FAILED, 0, message)
        raise error

    with pytest.raises(daemon.DomainError) as raised:
        asyncio.run(daemon.call(failing))
    assert raised.value.message == line
    assert raised.value.code == libvirt.VIR_ERR_HOOK_SCRIPT_FAILED


@pytest.mark.parametrize(
    ("code", "message", "user", "hint"),
    [
        (libvirt.VIR_ERR_AUTH_UNAVAILABLE, "no polkit agent", 1000, "run sevhop as root"),
        (libvirt.VIR_ERR_INTERNAL_ERROR, "Unable to get system bus connection", 1000, "run sevhop as root"),
        (libvirt.VIR_ERR_INTERNAL_ERROR, "Unable to get system bus connection", 0, ""),
        (libvirt.VIR_ERR_SYSTEM_ERROR, "No such file", 1000, "start libvirt's daemon, or correct --connect"),
    ],
)
def test_user_whom_libvirt_does_not_accept_is_told_to_be_root(
    code: int, message: str, user: int, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(uri: str) -> None:
        error = libvirt.libvirtError(message)
        error.err = (code, 0, message)
        raise error

    monkeypatch.setattr(libvirt, "open", failing)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    with pytest.raises(daemon.DomainError) as raised:
        asyncio.run(daemon.Daemon.open())
    assert raised.value.hint == hint


HANGS = """
import asyncio
import subprocess
import sys
import threading
from sevhop.libvirt import daemon

class Raw:
    def close(self):
        threading.Event().wait()

async def hangs():
    try:
        await daemon.call(threading.Event().wait, timeout=0.1)
    finally:
        daemon.Daemon(Raw(), "").close()

asyncio.run(hangs())
"""


def test_program_exits_if_the_daemon_hangs() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "DomainTimeout: libvirt did not answer within 0.1 s (restart the libvirt daemon" in done.stderr


def test_calls_use_a_free_thread_again() -> None:
    async def idents() -> list[int]:
        return [await daemon.call(threading.get_ident) for _ in range(20)]

    assert len(set(asyncio.run(idents()))) <= 2


class Raw:
    """libvirt's object of a domain, whose QEMU does not answer."""

    def __init__(self, control: tuple[int, int, int] | libvirt.libvirtError) -> None:
        self._control = control

    def controlInfo(self) -> tuple[int, int, int]:
        if isinstance(self._control, libvirt.libvirtError):
            raise self._control
        return self._control


@pytest.mark.parametrize(
    ("control", "doing"),
    [
        ((libvirt.VIR_DOMAIN_CONTROL_OCCUPIED, 0, 9900), "libvirt is waiting for QEMU, for 9.9 s"),
        ((libvirt.VIR_DOMAIN_CONTROL_OK, 0, 0), "libvirt is not executing it"),
        ((libvirt.VIR_DOMAIN_CONTROL_JOB, 0, 12_000), "a job of libvirt's is in progress, for 12.0 s"),
        (libvirt.libvirtError("gone"), "libvirt does not answer, either"),
    ],
)
def test_monitor_timeout_reports_what_libvirt_is_doing(
    control: tuple[int, int, int] | libvirt.libvirtError, doing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(libvirt_qemu, "qemuMonitorCommandWithFiles", lambda *_: released.wait(10))
    monitor = DomainMonitor(lambda: Raw(control), "web")
    try:
        with pytest.raises(MonitorTimeout) as caught:
            asyncio.run(monitor.execute("qom-get", timeout=0.05))
    finally:
        released.set()
    assert caught.value.message == f"QEMU did not answer qom-get within 0.05 s ({doing})"


def test_connection_limits_each_call() -> None:
    """Less than by default while a guest is stopped, also for QEMU's monitor."""

    async def limited() -> None:
        connection = daemon.Daemon(None, "", timeout=0.1)
        with pytest.raises(daemon.DomainTimeout, match=r"within 0\.1 s"):
            await connection.call(threading.Event().wait)

    asyncio.run(limited())
    raw = Raw((libvirt.VIR_DOMAIN_CONTROL_OK, 0, 0))
    monitor = DomainMonitor(lambda: raw, "web", lambda: 0.05)
    with pytest.raises(MonitorTimeout, match=r"within 0\.05 s"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(libvirt_qemu, "qemuMonitorCommandWithFiles", lambda *_: time.sleep(0.2))
        asyncio.run(monitor.execute("query-status"))


_POLKIT = "Unable to get system bus connection"


@pytest.mark.parametrize(
    ("uid", "uri", "code", "message", "hint"),
    [
        (1000, daemon.DEFAULT_URI, libvirt.VIR_ERR_INTERNAL_ERROR, _POLKIT, "run sevhop as root"),
        (1000, daemon.DEFAULT_URI, libvirt.VIR_ERR_AUTH_UNAVAILABLE, "no agent", "run sevhop as root"),
        (1000, daemon.DEFAULT_URI, libvirt.VIR_ERR_SYSTEM_ERROR, "connect: Permission denied", "run sevhop as root"),
        (1000, daemon.DEFAULT_URI, libvirt.VIR_ERR_SYSTEM_ERROR, "No such file", "start libvirt's daemon"),
        (1000, "nonsense:///", libvirt.VIR_ERR_NO_CONNECT, "no driver", ""),
        (0, daemon.DEFAULT_URI, libvirt.VIR_ERR_INTERNAL_ERROR, _POLKIT, ""),
    ],
)
def test_connection_that_fails_is_reported_with_what_to_do(
    uid: int, uri: str, code: int, message: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: str) -> None:
        error = libvirt.libvirtError(message)
        error.err = (code, 0, message, 2, "", None, None, 0, 0)
        raise error

    monkeypatch.setattr(libvirt, "open", refuse)
    monkeypatch.setattr("os.geteuid", lambda: uid)
    with pytest.raises(daemon.DomainError) as caught:
        asyncio.run(daemon.Daemon.open(uri))
    assert caught.value.message == message
    assert caught.value.hint.partition(",")[0] == hint
