"""What users without privileges try: foreign sockets, paths that are created before us, planted links."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import pickle
import socket
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sevhop.keeper import destination
from sevhop.keeper.config import KeeperError
from sevhop.keeper.handover import SourceHandles
from sevhop.keeper.paths import KeeperPaths
from sevhop.keeper.server import KeeperServer
from sevhop.keeper.state import State
from sevhop.libvirt import hook, hook_server
from sevhop.records import run_directory
from sevhop.records.run_directory import HopInProgress, RunDirectoryError
from sevhop_qmp.process import QemuProcess

from .keeper_config import UUID, config

NOBODY, QEMU, OTHER = 65534, 64055, 64056

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def as_user(uid: int, function: Callable[[], object]) -> object:
    """What a function returns, or the class of what it raises, in a process of that user."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            result: object = function()
        except BaseException as err:
            result = type(err)
        os.write(write_end, pickle.dumps(result))
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as file:
        content = file.read()
    os.waitpid(pid, 0)
    return pickle.loads(content)


def call(path: Path, request: bytes) -> bytes:
    """Send a request to a socket; empty when it hangs up."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(20)
        sock.connect(str(path))
        try:
            sock.send(request)
            return sock.recv(4096)
        except (BrokenPipeError, ConnectionResetError):
            return b""


@pytest.fixture
def run(open_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of /run/sevhop; not created yet."""
    monkeypatch.setattr(run_directory, "RUN", open_directory / "sevhop")
    monkeypatch.setattr(run_directory, "DOMAINS", open_directory / "sevhop" / "domains")
    return open_directory / "sevhop"


class Serving:
    """A keeper of the domain ``web``, without a guest, whose QEMU runs as :data:`QEMU`."""

    def __init__(self) -> None:
        self.directory = run_directory.claim("web", UUID)
        self.monitor = self.directory / "monitor"
        self.monitor.mkdir(mode=0o700)
        self.server: KeeperServer
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        self._ready.wait()

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        self.server = KeeperServer(
            replace(config(), uid=QEMU, gid=QEMU, step_timeout=20),
            KeeperPaths(self.directory),
            SourceHandles(None, {}),
        )
        self.server.record.state = State.RESTORING
        control, qemus, hook = (
            run_directory.listening(self.directory / name, uid)
            for name, uid in (("control", 0), ("keeper", QEMU), ("hook", 0))
        )
        tasks = [
            asyncio.ensure_future(self.server.clients.listen(control, 0, self.server.answer_control)),
            asyncio.ensure_future(self.server.clients.listen(qemus, QEMU, self.server.answer_destination)),
            asyncio.ensure_future(hook_server.listen(hook, self.server.answer_hook)),
        ]
        self._ready.set()
        await self._end.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for listener in (control, qemus, hook):
            listener.close()

    def end(self) -> None:
        """As a keeper does when it exits."""
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()
        run_directory.remove("web", self.directory)


@pytest.fixture
def keeper(run: Path) -> Iterator[Serving]:
    """One that serves."""
    keeper = Serving()
    yield keeper
    keeper.end()


REQUESTS = {"control": b"status", "keeper": b"hello 1"}


@pytest.mark.parametrize("name", REQUESTS)
def test_peer_check_keeps_foreign_users_out(keeper: Serving, name: str) -> None:
    """Whatever has become of the permissions: SO_PEERCRED decides."""
    path = keeper.directory / name
    path.chmod(0o666)
    assert call(path, REQUESTS[name]).startswith(b"ok ")
    for uid in (NOBODY, OTHER):
        assert as_user(uid, lambda: call(path, REQUESTS[name])) == b""


def test_qemu_is_refused_by_the_control_socket(keeper: Serving) -> None:
    for name in ("control", "hook"):
        (keeper.directory / name).chmod(0o666)
        assert as_user(QEMU, lambda path=keeper.directory / name: call(path, b"release")) == b""  # type: ignore[misc]
    assert str(as_user(QEMU, lambda: call(keeper.directory / "keeper", b"hello 1"))).startswith("b'ok ")


def test_permissions_keep_foreign_users_out(keeper: Serving, run: Path) -> None:
    for name in ("control", "keeper", "hook"):
        assert as_user(NOBODY, lambda path=keeper.directory / name: call(path, b"status")) is PermissionError  # type: ignore[misc]
    for path in (run, run / "domains", keeper.directory, keeper.monitor):
        assert as_user(NOBODY, lambda path=path: os.listdir(path)) is PermissionError  # type: ignore[misc]


def test_directory_of_a_keeper_is_reached_by_qemus_user_whatever_the_umask() -> None:
    """That of a service's is 0077."""
    before = os.umask(0o077)
    try:
        directory = run_directory.claim("web", UUID)
    finally:
        os.umask(before)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o711
    assert stat.S_IMODE(directory.parent.stat().st_mode) == 0o711


def test_names_cannot_be_guessed(run: Path) -> None:
    names = {run_directory.make().name for _ in range(20)}
    assert len(names) == 20
    assert all(len(name) == 32 for name in names)


def test_many_connections_do_not_use_up_the_keeper(keeper: Serving) -> None:
    """QEMU's user could keep the command and the hook out while it has the guest."""

    def connect() -> bytes:
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) for _ in range(100)]
            for sock in socks:
                sock.connect(str(keeper.directory / "keeper"))
            socks[-1].settimeout(20)
            return socks[-1].recv(1)

    assert as_user(QEMU, connect) == b""
    assert call(keeper.directory / "control", b"status").startswith(b"ok ")


def test_directory_in_place_of_the_monitor_refuses_the_restore(keeper: Serving) -> None:
    (keeper.monitor / "qmp").mkdir()
    answer = call(keeper.directory / "control", f"hook restore begin {UUID}".encode()).decode()
    assert answer.startswith("error ")
    assert "cannot remove" in answer


class _ForeignMonitor:
    """A monitor that another process serves."""

    def __init__(self, peer: int) -> None:
        self.peer = peer
        self.closed = False

    async def close(self) -> None:
        self.closed = True


def test_monitor_of_another_user_is_refused(keeper: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "60"], user=OTHER, group=OTHER, extra_groups=[]) as process:
        monitor = _ForeignMonitor(process.pid)

        async def connect(*_: object, **__: object) -> _ForeignMonitor:
            return monitor

        monkeypatch.setattr("sevhop.keeper.destination.Monitor.connect", connect)
        try:
            with pytest.raises(KeeperError, match="of another user"):
                asyncio.run(destination.probe(config(), KeeperPaths(tmp_path)))
        finally:
            process.kill()
    assert monitor.closed


@pytest.mark.parametrize("squatted", ["sevhop", "sevhop/domains"])
@pytest.mark.parametrize("how", ["link", "file", "foreign", "open to all", "open to a group"])
def test_run_directory_of_another_user_is_not_used(open_directory: Path, run: Path, squatted: str, how: str) -> None:
    victim = open_directory / "victim"
    victim.mkdir(mode=0o755)
    path = open_directory / squatted
    path.parent.mkdir(mode=0o711, exist_ok=True)
    if how == "link":
        path.symlink_to(victim)
    elif how == "file":
        path.write_text("")
    else:
        path.mkdir()
        path.chmod({"foreign": 0o711, "open to all": 0o1777, "open to a group": 0o770}[how])
        if how == "foreign":
            os.chown(path, NOBODY, NOBODY)
    before = path.lstat()
    for use in (run_directory.make_run_directories, lambda: run_directory.claim("web", UUID)):
        with pytest.raises(RunDirectoryError) as caught:
            use()
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
    assert list(victim.iterdir()) == []
    assert victim.stat().st_mode & 0o777 == 0o755
    assert (path.lstat().st_uid, path.lstat().st_mode) == (before.st_uid, before.st_mode)


@pytest.mark.parametrize("target", ["/", "..", "../victim", "../../victim", "/{victim}", "victim", ""])
def test_planted_link_is_not_followed(open_directory: Path, run: Path, target: str) -> None:
    """Its target would be removed as what a dead keeper has left."""
    run_directory.make_run_directories()
    for victim in (open_directory / "victim", run / "victim", run / "domains" / "victim"):
        victim.mkdir()
        (victim / "precious").write_text("")
    link = run / "domains" / "web"
    link.symlink_to(target.format(victim=open_directory / "victim") or ".")
    assert run_directory.hop_of("web") is None
    with pytest.raises(RunDirectoryError, match="remove it"):
        run_directory.claim("web", UUID)
    assert len(list(open_directory.rglob("precious"))) == 3
    assert link.is_symlink()


@pytest.mark.parametrize("name", ["", ".", "..", "/", "/etc/localtime", "../x", "a/b", "a\0b", "a" * 256, "\ud800"])
def test_invalid_domain_name_is_refused(run: Path, open_directory: Path, name: str) -> None:
    assert run_directory.hop_of(name) is None
    with pytest.raises(RunDirectoryError):
        run_directory.claim(name, UUID)
    assert {path.name for path in open_directory.rglob("*")} <= {"sevhop", "domains"}


@pytest.mark.parametrize("name", ["a b;$(touch x)&'<\"", "-n", "--", "...", "a\nb", "gäst", "\udcff", "*", " "])
def test_unusual_domain_name_is_accepted(run: Path, name: str) -> None:
    directory = run_directory.claim(name, UUID)
    assert (run / f"uuid-{UUID}").resolve() == directory.resolve()
    assert run_directory.hop_of(name) == run / "domains" / ".." / directory.name
    assert run_directory.hops_in_progress() == [name]
    run_directory.remove(name, directory)
    assert os.listdir(run) == ["domains"]
    assert run_directory.hops_in_progress() == []


@pytest.mark.parametrize("uuid", ["", "-", "..", "../x", f"{UUID}/..", f"{UUID}\n"])
def test_invalid_uuid_is_refused(run: Path, open_directory: Path, uuid: str) -> None:
    with pytest.raises(RunDirectoryError):
        run_directory.claim("web", uuid)
    assert {path.name for path in open_directory.rglob("*")} <= {"sevhop", "domains"}


def test_renamed_domain_is_not_claimed_again(keeper: Serving, run: Path) -> None:
    with pytest.raises(HopInProgress):
        run_directory.claim("renamed", UUID)
    assert run_directory.hops_in_progress() == ["web"]
    assert (run / f"uuid-{UUID}").resolve() == keeper.directory.resolve()


def test_run_directory_of_a_dead_keeper_is_replaced(run: Path) -> None:
    left = run_directory.claim("web", UUID)
    directory = run_directory.claim("renamed", UUID)
    assert (run / f"uuid-{UUID}").resolve() == directory.resolve() != left.resolve()
    run_directory.sweep(set())
    assert sorted(os.listdir(run)) == ["domains"]


def test_run_directory_that_a_journal_names_is_not_swept(run: Path) -> None:
    """The hook finds a transit without a keeper by it."""
    directory = run_directory.claim("web", UUID)
    run_directory.sweep({str(directory)})
    assert run_directory.hops_in_progress() == ["web"]
    assert (run / f"uuid-{UUID}").resolve() == directory.resolve()


def test_guest_in_a_transit_is_found_before_its_keeper_listens(run: Path) -> None:
    """Whoever starts its domain meanwhile would start it beside it; and nothing but its keeper takes its place."""
    transit = f"{os.getpid()} {QemuProcess.open(os.getpid()).start_time}"
    left = run_directory.claim("web", UUID, transit=transit)
    directory = run_directory.claim("web", UUID, transit=transit)
    assert not left.exists()
    xml = f"<domain><name>web</name><uuid>{UUID}</uuid></domain>"
    for name in ("web", "renamed"):
        refusal = io.StringIO()
        arguments = [name, "prepare", "begin", "-"]
        status = hook.main(arguments, io.StringIO(xml), io.StringIO(), refusal, domains=str(run / "domains"))
        assert (status, f"its guest runs in the transit (process {os.getpid()})" in refusal.getvalue()) == (1, True)
    for other in ("web", "renamed"):
        with pytest.raises(HopInProgress):
            run_directory.claim(other, UUID)
    run_directory.sweep(set())
    assert run_directory.hop_with(UUID) == directory
    (directory / hook.TRANSIT).write_text(f"{os.getpid()} 1")  # another process has its pid
    run_directory.sweep(set())
    assert os.listdir(run) == ["domains"]


def test_second_claim_is_refused(keeper: Serving) -> None:
    with pytest.raises(HopInProgress):
        run_directory.claim("web", UUID)


def test_ordinary_user_is_not_asked_to_remove_what_is_roots(
    open_directory: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (open_directory / "sevhop").mkdir(mode=0o711)
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    with pytest.raises(RunDirectoryError) as caught:
        run_directory.make_run_directories()
    assert caught.value.hint == "run sevhop as root"
