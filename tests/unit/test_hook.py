"""libvirt's hook, with a keeper that says what the test wants."""

from __future__ import annotations

import io
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sevhop
from sevhop import hook

UUID = "11111111-2222-3333-4444-555555555501"
XML = f"""<domain type='kvm'>
  <name>web</name>
  <uuid>{UUID}</uuid>
  <devices><emulator>/usr/bin/qemu</emulator></devices>
  <!-- SEVHOP_KEEPER=/run/sevhop/0123/keeper -->
</domain>
"""
FOREIGN = XML.replace("0123", "")
SCRIPT = Path(sevhop.__file__).parent / "host" / "qemu.d" / "sevhop"


class FakeKeeper:
    """A keeper of the domain ``web``; what it was asked, and what it answers."""

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
        """Answer from now on."""
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
def keeper(tmp_path: Path) -> FakeKeeper:
    """Not alive yet."""
    return FakeKeeper(tmp_path)


def run(keeper: FakeKeeper, *arguments: str, xml: str = XML) -> tuple[int, str, str]:
    """Exit status, what was printed, and the reason that was given."""
    out, err = io.StringIO(), io.StringIO()
    status = hook.main(list(arguments), io.StringIO(xml), out, err, domains=str(keeper.domains))
    return status, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("operation", ["restore", "prepare", "started", "migrate"])
def test_steps_that_matter_are_the_keepers_business(keeper: FakeKeeper, operation: str) -> None:
    with keeper.alive():
        assert run(keeper, "web", operation, "begin", "-") == (0, "", "")
    assert keeper.asked == [f"hook {operation} begin {UUID}"]


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
def test_what_does_not_matter_costs_nothing(keeper: FakeKeeper, arguments: tuple[str, ...]) -> None:
    with keeper.alive():
        keeper.answer = "no"
        assert run(keeper, *arguments) == (0, "", "")
    assert keeper.asked == []


def test_restore_gets_the_keepers_emulator(keeper: FakeKeeper) -> None:
    with keeper.alive():
        keeper.answer = "ok /opt/qemu"
        status, printed, _ = run(keeper, "web", "restore", "begin", "-")
    assert status == 0
    assert printed == XML.replace("/usr/bin/qemu", "/opt/qemu")


def test_nothing_is_printed_when_nothing_changes(keeper: FakeKeeper) -> None:
    """libvirt reads whatever is printed as a new domain."""
    with keeper.alive():
        keeper.answer = "ok /usr/bin/qemu"
        assert run(keeper, "web", "restore", "begin", "-") == (0, "", "")
        keeper.answer = "ok /opt/qemu"
        assert run(keeper, "web", "prepare", "begin", "-") == (0, "", "")


def test_refusal_has_a_reason(keeper: FakeKeeper) -> None:
    with keeper.alive():
        keeper.answer = "no the guest is held"
        assert run(keeper, "web", "prepare", "begin", "-") == (1, "", "sevhop: the guest is held\n")


@pytest.mark.parametrize("answer", ["", "yes", "okay", "\xff"])
def test_nonsense_is_a_refusal(keeper: FakeKeeper, answer: str) -> None:
    with keeper.alive():
        keeper.answer = answer
        assert run(keeper, "web", "started", "begin", "-")[0] == 1


def test_a_foreign_domain_of_the_same_name_goes_on(keeper: FakeKeeper) -> None:
    with keeper.alive():
        keeper.answer = "foreign"
        assert run(keeper, "web", "started", "begin", "-") == (0, "", "")


@pytest.mark.parametrize("xml", ["", "<domain/>", "<uuid>", "<uuid>x y\n</uuid>"])
def test_a_domain_without_uuid_is_nobodys(keeper: FakeKeeper, xml: str) -> None:
    with keeper.alive():
        run(keeper, "web", "started", "begin", "-", xml=xml)
    assert keeper.asked == ["hook started begin -"]


@pytest.mark.parametrize("operation", ["restore", "prepare", "started"])
def test_dead_keeper_stops_its_own_destination_only(keeper: FakeKeeper, operation: str) -> None:
    status, _, reason = run(keeper, "web", operation, "begin", "-")
    assert status == 1
    assert "the keeper of domain web does not answer" in reason
    assert run(keeper, "web", operation, "begin", "-", xml=FOREIGN) == (0, "", "")


def script(keeper: FakeKeeper, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The script as installed, but for the directory."""
    text = SCRIPT.read_text().replace("/run/sevhop/domains", str(keeper.domains))
    text = text.replace("@PYTHON@", sys.executable).replace("@HOOK@", hook.__file__)
    path = tmp_path / "script"
    path.write_text(text)
    path.chmod(0o755)
    return subprocess.run([path, *arguments], input=XML, capture_output=True, text=True, check=False)


def test_script_asks_python_only_where_it_matters(keeper: FakeKeeper, tmp_path: Path) -> None:
    # The path in the module is the real one, where there is no such domain; -I keeps this directory out of the way.
    assert script(keeper, tmp_path, "web", "started", "begin", "-").returncode == 0
    (tmp_path / "broken").mkdir()
    text = SCRIPT.read_text().replace("/run/sevhop/domains", str(keeper.domains)).replace("@PYTHON@", "/bin/false")
    path = tmp_path / "broken" / "script"
    path.write_text(text)
    path.chmod(0o755)

    def status(*words: str) -> int:
        return subprocess.run([path, *words], input=XML, text=True, check=False).returncode

    assert status("web", "started", "begin", "-") == 1
    assert status("web", "restore", "begin", "-") == 1
    assert status("web", "reconnect", "begin", "-") == 0
    assert status("web", "stopped", "end", "shutdown") == 0
    assert status("other", "started", "begin", "-") == 0
    assert status("a name with 'quotes' $(false)", "started", "begin", "-") == 0


def test_script_is_executable() -> None:
    assert os.stat(SCRIPT).st_mode & stat.S_IXUSR
