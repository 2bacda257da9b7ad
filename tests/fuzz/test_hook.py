"""libvirt's hook: whatever it is called with, it returns 0 or 1, and at ``reconnect`` always 0."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import strategies as st
from sevhop.install import host
from sevhop.libvirt import hook

from .described_domains import xmls
from .inputs import fuzzed, raw, texts

NAMES = [
    ".",
    "..",
    "/",
    "",
    "a/b",
    "../domains/suspended",
    "/etc",
    "a\nb",
    "a\0b",
    "-n",
    "$(false)",
    "suspended",
    "\udcff",
]
NAMES.append("a" * 300)
OPERATIONS = ["restore", "prepare", "started", "migrate", "reconnect", "start", "stopped", "release"]
steps = st.tuples(st.sampled_from(OPERATIONS), st.sampled_from(["begin", "end", ""]))


class FakeKeeper:
    """A keeper of the domain ``suspended``, which replies what the test wants."""

    def __init__(self, directory: Path) -> None:
        self.answer = b""
        self.domains = directory / "domains"
        self.domains.mkdir()
        (directory / "0123").mkdir()
        (self.domains / "suspended").symlink_to("../0123")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(directory / "0123" / "control"))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock:
                sock.recv(4096)
                sock.send(self.answer)

    def end(self) -> None:
        """Close the socket."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


@pytest.fixture(scope="module")
def keeper() -> Iterator[FakeKeeper]:
    """One for all inputs."""
    with tempfile.TemporaryDirectory() as directory:
        keeper = FakeKeeper(Path(directory))
        yield keeper
        keeper.end()


def call(keeper: FakeKeeper, arguments: list[str], xml: str) -> tuple[int, str]:
    """Exit status, and standard output."""
    out, err = io.StringIO(), io.StringIO()
    status = hook.main(arguments, io.StringIO(xml), out, err, domains=str(keeper.domains))
    assert status in (0, 1)
    assert bool(status) == bool(err.getvalue()), "a refusal has a reason, and nothing else has"
    assert err.getvalue().count("\n") == status, "in one line"
    return status, out.getvalue()


@fuzzed(
    name=st.one_of(texts, st.sampled_from(NAMES)), step=st.one_of(steps, st.tuples(texts, texts)), extra=texts, xml=xmls
)
def test_hook_is_robust_against_any_call(
    keeper: FakeKeeper, name: str, step: tuple[str, str], extra: str, xml: str
) -> None:
    keeper.answer = b"ok"
    status, printed = call(keeper, [name, *step, extra], xml)
    if step[0] not in ("restore", "prepare", "started", "migrate"):
        assert (status, printed) == (0, "")


@fuzzed(arguments=st.lists(texts, max_size=5))
def test_hook_is_robust_against_any_arguments(keeper: FakeKeeper, arguments: list[str]) -> None:
    call(keeper, arguments, "")


@fuzzed(
    answer=st.one_of(
        raw, raw.map(lambda rest: b"ok " + rest), st.sampled_from([b"ok", b"ok /q", b"foreign", b"no\n\n"])
    ),
    step=steps,
    xml=xmls,
)
def test_hook_is_robust_against_any_reply_of_a_keeper(
    keeper: FakeKeeper, answer: bytes, step: tuple[str, str], xml: str
) -> None:
    keeper.answer = answer
    status, printed = call(keeper, ["suspended", *step, "-"], xml)
    if step[0] == "reconnect":
        assert (status, printed) == (0, "")
    if printed:
        assert step in (("restore", "begin"), ("migrate", "begin"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_hook_is_robust_against_hostile_names(keeper: FakeKeeper, name: str, operation: str) -> None:
    keeper.answer = b"error"
    status, _ = call(keeper, [name, operation, "begin", "-"], "<domain/>")
    suspended = name == "suspended" and operation in ("restore", "prepare", "started", "migrate")
    assert status == (1 if suspended else 0)


@pytest.mark.parametrize("xml", ["'SEVHOP_X", "<domain a='SEVHOP_X'>", "<domain a='SEVHOP_X'>\udcff</domain>"])
def test_invalid_xml_is_a_refusal(keeper: FakeKeeper, xml: str) -> None:
    """It was a traceback. The domain has additions of a hop in it, and must not continue with them."""
    assert call(keeper, ["other", "restore", "begin", "-"], xml) == (1, "")


def test_reply_that_is_not_unicode_is_a_refusal(keeper: FakeKeeper) -> None:
    keeper.answer = b"\xff\xfe"
    assert call(keeper, ["suspended", "started", "begin", "-"], "<domain/>") == (1, "")


def script(directory: Path) -> str:
    """As ``sevhop install`` writes it."""
    path = directory / "script"
    path.write_text(host.hook_script())
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "POSIX"])
@pytest.mark.parametrize("content", [b"<domain>\xff\xfe'SEVHOP_X</domain>", b"\0'SEVHOP_X", b"'SEVHOP_IMAGE'\xff"])
def test_xml_that_is_not_utf8_is_a_refusal(tmp_path: Path, locale: str, content: bytes) -> None:
    command = [script(tmp_path), "other", "restore", "begin", "-"]
    done = subprocess.run(command, input=content, capture_output=True, env={"LC_ALL": locale}, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(b"sevhop: ")
    assert done.stderr.count(b"\n") == 1


def test_xml_is_utf8_in_every_locale(tmp_path: Path) -> None:
    xml = "<domain><name>gäst</name><q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'>"
    left = xml + "<q:env name='SEVHOP_X' value='1'/></q:commandline></domain>"
    for locale in ("C", "C.UTF-8", "POSIX"):
        command = [script(tmp_path), "other", "restore", "begin", "-"]
        done = subprocess.run(command, input=left.encode(), capture_output=True, env={"LC_ALL": locale}, check=False)
        assert done.stdout.decode().strip() == "<domain><name>gäst</name></domain>"


def test_environment_is_ignored(tmp_path: Path) -> None:
    """Variables that make Python run other code do not affect a hook that libvirt runs as root."""
    for name in ("sevhop", "_socket", "os", "sitecustomize", "usercustomize", "encodings"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\n")
    hostile = dict.fromkeys(("PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE"), str(tmp_path))
    environment = {**os.environ, **hostile, "PYTHONSTARTUP": str(tmp_path / "os.py"), "PYTHONINSPECT": "1"}
    left = "<domain><q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'>"
    xml = left + "<q:env name='SEVHOP_X' value='1'/></q:commandline></domain>"
    command = [script(tmp_path), "other", "restore", "begin", "-"]
    done = subprocess.run(
        command, input=xml, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "<domain></domain>")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("name", ["a b;$(touch x)&'<\"", "-n", "--help", "$(touch x)", "`touch x`", "* ?[a]", "\\"])
def test_domain_name_is_not_executed_by_the_shell(tmp_path: Path, name: str) -> None:
    path = script(tmp_path)
    inside = tmp_path / "inside"
    inside.mkdir()
    for step in (("started", "begin"), ("restore", "begin"), ("prepare", "begin")):
        command = [path, name, *step, "-"]
        done = subprocess.run(command, input="<domain/>", capture_output=True, text=True, cwd=inside, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(inside.iterdir()) == []
