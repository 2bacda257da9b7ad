"""libvirt's hook, with a keeper that replies what the test wants."""

from __future__ import annotations

import io
import os
import socket
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sevhop
from sevhop.install import host
from sevhop.libvirt import domain_xml, hook, xml_elements

from .hooked_domain import DESTINATION, HOPPED, IMAGE, UUID, XML

SCRIPT = Path(sevhop.__file__).parent / "host" / "qemu.d" / "sevhop"


class FakeKeeper:
    """A keeper of the domain ``web``; its requests, and its reply."""

    def __init__(self, run: Path) -> None:
        self.asked: list[str] = []
        self.answer = "ok"
        self.domains = run / "domains"
        self.domains.mkdir()
        self.directory = run / "0123"
        self.directory.mkdir()
        (self.domains / "web").symlink_to("../0123")

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Serve from now on."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(self.directory / "control"))
            listener.listen()
            thread = threading.Thread(target=self._serve, args=(listener,))
            thread.start()
            yield
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with sock:
                self.asked.append(sock.recv(4096).decode())
                sock.send(self.answer.encode())


@pytest.fixture
def keeper() -> Iterator[FakeKeeper]:
    """Not alive yet. The path of a socket has to be short."""
    with tempfile.TemporaryDirectory() as directory:
        yield FakeKeeper(Path(directory))


def run(keeper: FakeKeeper, *arguments: str, xml: str = XML) -> tuple[int, str, str]:
    """Exit status, standard output, and the reason on standard error."""
    out, err = io.StringIO(), io.StringIO()
    status = hook.main(list(arguments), io.StringIO(xml), out, err, domains=str(keeper.domains))
    return status, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("operation", ["restore", "prepare", "started", "migrate"])
def test_keeper_is_asked_at_some_steps(keeper: FakeKeeper, operation: str) -> None:
    with keeper.alive():
        printed = XML if operation == "restore" else ""
        assert run(keeper, "web", operation, "begin", "-") == (0, printed, "")
    sub = {"prepare": "cold-start", "restore": "another"}.get(operation, "begin")
    assert keeper.asked == [f"hook {operation} {sub} {UUID}"]


def test_keeper_is_asked_when_an_image_is_restored(keeper: FakeKeeper) -> None:
    with keeper.alive():
        assert run(keeper, "web", "prepare", "begin", "-", xml=DESTINATION) == (0, "", "")
        assert run(keeper, "web", "restore", "begin", "-", xml=IMAGE)[0] == 0
    assert keeper.asked == [f"hook prepare begin {UUID}", f"hook restore begin {UUID}"]


def test_image_of_a_domain_that_has_hopped_before_is_another(keeper: FakeKeeper) -> None:
    """virsh save has written it, with what that hop had left in the domain."""
    with keeper.alive():
        keeper.answer = "error another"
        assert run(keeper, "web", "restore", "begin", "-", xml=HOPPED) == (1, "", "sevhop: another\n")
    assert keeper.asked == [f"hook restore another {UUID}"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("web", "reconnect", "begin", "-"),
        ("web", "start", "begin", "-"),
        ("web", "stopped", "end", "destroyed"),
        ("web", "release", "end", "destroyed"),
        ("web", "attach", "begin", "-"),
        ("web", "a step of the future", "begin", "-"),
        ("other", "started", "begin", "-"),
        ("..", "started", "begin", "-"),
        ("../domains/web", "started", "begin", "-"),
        ("", "started", "begin", "-"),
        ("web",),
        (),
    ],
)
def test_keeper_is_not_asked_at_other_steps(keeper: FakeKeeper, arguments: tuple[str, ...]) -> None:
    with keeper.alive():
        keeper.answer = "error"
        assert run(keeper, *arguments) == (0, "", "")
    assert keeper.asked == []


def test_restore_gets_the_keepers_emulator(keeper: FakeKeeper) -> None:
    with keeper.alive():
        keeper.answer = "ok /opt/qemu"
        status, printed, _ = run(keeper, "web", "restore", "begin", "-", xml=IMAGE)
    assert status == 0
    assert printed == DESTINATION.replace("/usr/bin/qemu", "/opt/qemu")


@pytest.mark.parametrize(("operation", "times"), [("restore", 1), ("prepare", 1), ("started", 0)])
def test_destination_is_parsed_only_where_that_decides(
    keeper: FakeKeeper, monkeypatch: pytest.MonkeyPatch, operation: str, times: int
) -> None:
    """The guest is stopped, and a large domain takes milliseconds."""
    parsed: list[bytes] = []
    elements = xml_elements.parse

    def recorded(text: bytes) -> object:
        parsed.append(text)
        return elements(text)

    monkeypatch.setattr(domain_xml, "parse", recorded)
    with keeper.alive():
        assert run(keeper, "web", operation, "begin", "-", xml=IMAGE if operation == "restore" else DESTINATION)[0] == 0
    assert len(parsed) == times


@pytest.mark.parametrize("operation", ["restore", "migrate", "started"])
def test_text_that_looks_like_a_mark_is_none(keeper: FakeKeeper, operation: str) -> None:
    xml = XML.replace("<devices>", "<metadata><a b='SEVHOP_IMAGE' c='SEVHOP_RESTORED'/></metadata><devices>")
    assert run(keeper, "other", operation, "begin", "-", xml=xml) == (0, "", "")


def test_restore_gets_other_ports_after_a_failed_one(keeper: FakeKeeper) -> None:
    """Those that it had may be in use, and may be why it failed."""
    graphics = "<graphics type='vnc' port='5901' autoport='no'/></devices>"
    mark = "<qemu:env name='SEVHOP_AUTOPORT' value='0'/></qemu:commandline>"
    xml = IMAGE.replace("</devices>", graphics).replace("</qemu:commandline>", mark)
    with keeper.alive():
        for answer, autoport in (("ok /opt/qemu", "no"), ("again /opt/qemu", "yes")):
            keeper.answer = answer
            status, printed, _ = run(keeper, "web", "restore", "begin", "-", xml=xml)
            assert (status, f"autoport='{autoport}'" in printed) == (0, True)
            assert "<emulator>/opt/qemu</emulator>" in printed


def test_hook_prints_only_at_a_restore(keeper: FakeKeeper) -> None:
    """libvirt reads whatever is printed as a new domain."""
    with keeper.alive():
        keeper.answer = "ok /opt/qemu"
        assert run(keeper, "web", "prepare", "begin", "-") == (0, "", "")


def test_refusal_of_the_keeper_has_a_reason(keeper: FakeKeeper) -> None:
    with keeper.alive():
        keeper.answer = "error the guest is suspended"
        assert run(keeper, "web", "prepare", "begin", "-") == (1, "", "sevhop: the guest is suspended\n")


@pytest.mark.parametrize("answer", ["", "yes", "okay", "\xff"])
def test_invalid_reply_is_a_refusal(keeper: FakeKeeper, answer: str) -> None:
    with keeper.alive():
        keeper.answer = answer
        assert run(keeper, "web", "started", "begin", "-", xml=DESTINATION)[0] == 1


def test_foreign_domain_of_the_same_name_is_left_alone(keeper: FakeKeeper) -> None:
    with keeper.alive():
        keeper.answer = "foreign"
        assert run(keeper, "web", "started", "begin", "-") == (0, "", "")


@pytest.mark.parametrize("xml", ["", "<domain/>", "<uuid>", "<uuid>x y\n</uuid>"])
def test_request_has_a_dash_for_a_domain_without_uuid(keeper: FakeKeeper, xml: str) -> None:
    with keeper.alive():
        run(keeper, "web", "started", "begin", "-", xml=xml)
    assert keeper.asked == ["hook started begin -"]


@pytest.mark.parametrize(("operation", "xml"), [("restore", IMAGE), ("started", DESTINATION)])
@pytest.mark.parametrize("name", ["web", "other"])
def test_guest_is_refused_if_its_keeper_is_gone(keeper: FakeKeeper, name: str, operation: str, xml: str) -> None:
    status, printed, reason = run(keeper, name, operation, "begin", "-", xml=xml)
    assert (status, printed) == (1, "")
    assert f"the keeper of domain {name} is gone" in reason


@pytest.mark.parametrize("operation", ["restore", "prepare", "migrate", "started"])
def test_guest_is_refused_if_its_keeper_does_not_reply(keeper: FakeKeeper, operation: str) -> None:
    """The keeper is restarted: the guest is not lost, and nobody may start it meanwhile."""
    keeper.answer = ""
    with keeper.alive():
        status, printed, reason = run(keeper, "web", operation, "begin", "-")
    assert (status, printed) == (1, "")
    assert "did not reply, and has its guest; try again" in reason
    assert len(keeper.asked) == 1


@pytest.mark.parametrize("operation", ["restore", "prepare", "migrate", "started"])
def test_other_domains_are_left_alone_if_a_keeper_is_dead(keeper: FakeKeeper, operation: str) -> None:
    assert run(keeper, "web", operation, "begin", "-") == (0, "", "")


@pytest.mark.parametrize("operation", ["restore", "migrate"])
@pytest.mark.parametrize("xml", [HOPPED, DESTINATION])
def test_additions_of_an_earlier_hop_are_removed(keeper: FakeKeeper, operation: str, xml: str) -> None:
    status, printed, _ = run(keeper, "other", operation, "begin", "-", xml=xml)
    assert status == 0
    assert "".join(printed.split()) == "".join(XML.split())


REBOOTING = XML.replace("<devices>", "<on_reboot>restart</on_reboot><devices>")


class Reboots:
    """The mark of the domain ``web``, and what is started."""

    def __init__(self, domains: Path) -> None:
        self.directory = domains.parent / "reboot" / "web"
        self.domains = domains
        self.started: list[tuple[str, str]] = []

    def mark(self, byte: bytes, uuid: str = UUID) -> None:
        self.directory.mkdir(parents=True)
        (self.directory / "mark").write_bytes(byte)
        (self.directory / "domain").write_text(f"{uuid} qemu:///system")

    def released(self, name: str = "web", xml: str = REBOOTING) -> None:
        out, err = io.StringIO(), io.StringIO()
        words = [name, "release", "end", "shutdown"]
        options: dict[str, Any] = {"domains": str(self.domains), "start": lambda *domain: self.started.append(domain)}
        assert hook.main(words, io.StringIO(xml), out, err, **options) == 0
        assert out.getvalue() == err.getvalue() == ""


@pytest.fixture
def reboots(tmp_path: Path) -> Reboots:
    return Reboots(tmp_path / "domains")


def test_domain_that_has_rebooted_during_a_hop_is_started(reboots: Reboots) -> None:
    reboots.mark(b"\1")
    reboots.domains.mkdir()
    (reboots.domains / "web").symlink_to("../0123")
    reboots.released()
    assert reboots.started == [(UUID, "qemu:///system")]


def test_domain_that_has_rebooted_is_started_once(reboots: Reboots) -> None:
    reboots.mark(b"\1")
    reboots.released()
    assert reboots.started == [(UUID, "qemu:///system")]
    assert not reboots.directory.exists()
    reboots.released()
    assert len(reboots.started) == 1


@pytest.mark.parametrize(
    ("byte", "uuid", "xml"),
    [
        (b"\0", UUID, REBOOTING),
        (b"", UUID, REBOOTING),
        (b"\1\1", UUID, REBOOTING),
        (b"\1", UUID, XML),
        (b"\1", UUID, REBOOTING.replace("restart", "destroy")),
        (b"\1", UUID, REBOOTING.replace("on_reboot", "metadata")),
        (b"\1", UUID, REBOOTING.replace("</domain>", "")),
        (b"\1", "22222222-2222-3333-4444-555555555501", REBOOTING),
    ],
)
def test_domain_is_started_only_after_a_reboot_and_if_it_says_so(
    reboots: Reboots, byte: bytes, uuid: str, xml: str
) -> None:
    reboots.mark(byte, uuid)
    reboots.released(xml=xml)
    assert reboots.started == []
    assert not reboots.directory.exists()


def test_other_domains_are_not_started(reboots: Reboots) -> None:
    reboots.mark(b"\1")
    for name in ("other", "..", "../reboot/web", ""):
        reboots.released(name)
    assert reboots.started == []
    assert reboots.directory.exists()


def test_hook_script_looks_at_the_mark_when_the_domain_is_off(tmp_path: Path) -> None:
    asks = tmp_path / "asks"
    asks.write_text("#!/bin/sh\nexit 7\n")
    asks.chmod(0o755)
    path = tmp_path / "script"
    path.write_text(SCRIPT.read_text().replace("/run/sevhop", str(tmp_path)).replace("@PYTHON@", str(asks)))
    path.chmod(0o755)

    def status(operation: str, sub: str) -> int:
        return subprocess.run([path, "web", operation, sub, "-"], input=XML, text=True, check=False).returncode

    assert status("release", "end") == 0
    (tmp_path / "reboot" / "web").mkdir(parents=True)
    mark = tmp_path / "reboot" / "web" / "mark"
    mark.touch()
    assert (status("release", "end"), status("stopped", "end"), status("started", "begin")) == (7, 0, 0)
    assert mark.exists()
    assert status("prepare", "begin") == 0
    assert not mark.exists(), "it is of an earlier QEMU"
    (tmp_path / "domains").mkdir()
    (tmp_path / "domains" / "web").symlink_to("../0123")
    assert status("release", "end") == 0
    mark.write_bytes(b"\0")
    assert status("release", "end") == 0, "the hop has ended its QEMU, or somebody has: no Python during the downtime"
    mark.write_bytes(b"\1")
    assert (status("release", "end"), status("stopped", "end")) == (7, 0), "the guest reboots during a hop"


def test_domain_is_started_by_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """libvirt waits until the hook has exited, and nobody has its pipes open."""
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nreadlink /proc/self/fd/2 >{tmp_path}/out\necho $PYTHONPATH $* >>{tmp_path}/out\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    hook.start_again(UUID, "qemu:///system")
    _, status = os.wait()
    assert status == 0
    null, words = (tmp_path / "out").read_text().splitlines()
    assert null == "/dev/null"
    packages = Path(sevhop.__file__).parents[1]
    assert words == f"{packages} -s -P -m sevhop.cli.cold_start {UUID} qemu:///system"


def test_hook_script_runs_python_only_at_some_steps(keeper: FakeKeeper, tmp_path: Path) -> None:
    text = SCRIPT.read_text().replace("/run/sevhop/domains", str(keeper.domains))
    text = text.replace("@PYTHON@", "/bin/false").replace("@CLIENT@", "/no/such/file")
    path = tmp_path / "script"
    path.write_text(text)
    path.chmod(0o755)

    def status(*arguments: str, xml: str = XML) -> int:
        return subprocess.run([path, *arguments], input=xml, text=True, check=False).returncode

    assert status("web", "started", "begin", "-") == 1
    assert status("web", "restore", "begin", "-") == 1
    assert status("web", "reconnect", "begin", "-") == 0
    assert status("web", "stopped", "end", "shutdown") == 0
    assert status("other", "started", "begin", "-") == 0
    assert status("other", "restore", "begin", "-") == 0
    assert status("other", "restore", "begin", "-", xml=HOPPED) == 1
    assert status("other", "started", "begin", "-", xml=HOPPED) == 0
    assert status("a name with 'quotes' $(false)", "started", "begin", "-") == 0


def test_renamed_domain_is_found_by_its_uuid(keeper: FakeKeeper) -> None:
    (keeper.domains.parent / f"uuid-{UUID}").symlink_to("0123")
    keeper.answer = "error the guest is suspended"
    with keeper.alive():
        steps = ("prepare", "restore", "migrate")
        answers = [run(keeper, "renamed", operation, "begin", "-") for operation in steps]
        other = run(keeper, "other", "prepare", "begin", "-", xml=XML.replace(UUID[:8], "33333333"))
    assert answers == [(1, "", "sevhop: the guest is suspended\n")] * 3
    assert other == (0, "", "")
    assert len(keeper.asked) == 3


@pytest.mark.parametrize("client", [True, False])
def test_hook_script_looks_for_a_uuid_only_during_a_hop(tmp_path: Path, client: bool) -> None:
    asks = tmp_path / "asks"
    asks.write_text("#!/bin/sh\ncat >&2\nexit 7\n")
    asks.chmod(0o755)
    text = SCRIPT.read_text().replace("/run/sevhop", str(tmp_path))
    text = text.replace("@CLIENT@", str(asks) if client else "/no/such/file").replace("@PYTHON@", str(asks))
    path = tmp_path / "script"
    path.write_text(text)
    path.chmod(0o755)

    def call(operation: str, xml: str) -> tuple[int, str, str]:
        argv = [str(path), "web", operation, "begin", "-"]
        done = subprocess.run(argv, input=xml, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    assert call("prepare", XML) == (0, "", "")
    (tmp_path / f"uuid-{UUID}").symlink_to("0123")
    assert call("prepare", XML) == call("restore", XML) == call("migrate", XML) == (7, "", XML)
    assert call("started", XML) == call("reconnect", XML) == call("stopped", XML) == (0, "", "")
    other = XML.replace(UUID, "22222222-2222-3333-4444-555555555501")
    assert call("prepare", other) == call("prepare", "") == call("prepare", "<uuid>../x</uuid>") == (0, "", "")
    assert call("prepare", HOPPED.replace(UUID, "22222222-2222-3333-4444-555555555501")) == (0, "", "")


def test_hook_script_runs_the_hook(tmp_path: Path) -> None:
    """As libvirt calls it: a domain that was in a hop is restored later."""
    path = tmp_path / "script"
    path.write_text(host.hook_script())
    path.chmod(0o755)
    command = [str(path), "no-such-domain", "restore", "begin", "-"]
    done = subprocess.run(command, input=HOPPED, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "".join(done.stdout.split()) == "".join(XML.split())
    done = subprocess.run(command, input=IMAGE, capture_output=True, text=True, check=False)
    assert done.returncode == 1


def test_hook_script_is_executable() -> None:
    assert os.stat(SCRIPT).st_mode & stat.S_IXUSR
