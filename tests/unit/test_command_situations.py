"""The command as a process, where something is not as it should be: one line or one object, and the exit status."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from sevhop.records.hop_record import VERSION

#: The command, with the state of the host elsewhere.
_ELSEWHERE = """
import sys
from pathlib import Path
from sevhop.records import journal, run_directory
state = Path(sys.argv.pop(1))
journal.DIRECTORY, run_directory.RUN, run_directory.DOMAINS = state / "journal", state / "run", state / "run/domains"
from sevhop.cli.main import main
sys.exit(main())
"""
#: A socket that nobody has.
NO_DAEMON = "qemu+unix:///system?socket=/nonexistent"
#: Commands that cannot succeed without a daemon or a guest, whoever calls them.
FAILING = (
    ["hop", "--qmp", "/nonexistent"],
    ["check", "--qmp", "/nonexistent"],
    ["check", "web", "--connect", NO_DAEMON],
    ["status", "--connect", NO_DAEMON],
    ["upgrade", "web", "--connect", NO_DAEMON],
    ["upgrade", "--outdated", "--connect", NO_DAEMON],
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
Done = subprocess.CompletedProcess[str]


#: The same for a user without rights, who may not be able to read Python's modules: they are imported before.
_AS_NOBODY = """
import contextlib, importlib, os, pkgutil, sys, sevhop, sevhop_qmp
for package in (sevhop, sevhop_qmp):
    for one in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not one.name.endswith("__main__"):
            with contextlib.suppress(ImportError):
                importlib.import_module(one.name)
os.environ["HOME"] = "/root"
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
"""


def names(words: Sequence[str]) -> str:
    return " ".join(words[:3])


def sevhop(*words: str | bytes, state: Path | None = None, nobody: bool = False, **options: Any) -> Done:
    """Run it. Nothing is taken from the caller's terminal."""
    script = (_AS_NOBODY if nobody else "") + _ELSEWHERE
    start: list[str] = ["-m", "sevhop.cli"] if state is None else ["-c", script, str(state)]
    command: list[str | bytes] = [sys.executable, *start, *words]
    defaults: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "cwd": "/",
    }
    return subprocess.run(
        command,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=120,
        check=False,
        **(defaults | options),
    )


def error_of(done: Done) -> str:
    """The only line that it has printed."""
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("sevhop: ")
    assert done.stdout == ""
    return line


def object_of(done: Done) -> dict[str, Any]:
    """The object that it has printed, and nothing else."""
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


@pytest.fixture
def state(open_directory: Path) -> Path:
    """State of the host: root's, and empty."""
    for name in ("journal", "run", "run/domains"):
        (open_directory / name).mkdir(mode=0o711 if name == "run" else 0o700)
    return open_directory


@pytest.mark.parametrize("words", FAILING, ids=names)
def test_failure_is_one_line(words: list[str], state: Path) -> None:
    done = sevhop(*words, state=state)
    assert error_of(done).endswith("; nothing was touched")
    assert done.returncode == 1


@pytest.mark.parametrize("words", FAILING, ids=names)
def test_failure_is_one_object(words: list[str], state: Path) -> None:
    done = sevhop(*words, "--json", state=state)
    found = object_of(done)
    assert (done.returncode, found["outcome"], found["guest_state"]) == (1, "refused", "untouched")
    assert "/nonexistent" in found["reason"]


@needs_root
@pytest.mark.parametrize(
    "words", [["recover"], ["recover", "web"], ["uninstall"], ["hop", "--qmp", "/nonexistent"]], ids=names
)
def test_user_without_rights_is_told_to_be_root(words: list[str], state: Path) -> None:
    done = sevhop(*words, state=state, nobody=True)
    assert "(run sevhop as root)" in error_of(done)
    assert done.returncode == 1
    done = sevhop(*words, "--json", state=state, nobody=True)
    found = object_of(done)
    assert (done.returncode, found["outcome"]) == (1, "refused")
    assert "(run sevhop as root)" in found["reason"]
    assert found["hint"] == "run sevhop as root"


@needs_root
@pytest.mark.parametrize("words", [*FAILING, ["install"], ["install", "--verify"]], ids=names)
def test_user_without_rights_gets_no_traceback(words: list[str], state: Path) -> None:
    done = sevhop(*words, state=state, nobody=True)
    error_of(done)
    assert done.returncode == 1


@needs_root
def test_socket_of_another_user_is_reported(state: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        path = state / "socket"
        listener.bind(str(path))
        listener.listen()
        path.chmod(0o600)
        done = sevhop("status", "--connect", f"qemu+unix:///system?socket={path}", state=state, nobody=True)
    assert "Permission denied (run sevhop as root)" in error_of(done)


@pytest.mark.parametrize("words", [["status"], ["check", "web"], ["upgrade", "--all"]], ids=names)
def test_refused_connection_is_reported(words: list[str], state: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        path = state / "socket"
        bound.bind(str(path))
        done = sevhop(*words, "--connect", f"qemu+unix:///system?socket={path}", state=state)
    assert "Connection refused (start libvirt's daemon, or correct --connect)" in error_of(done)
    assert done.returncode == 1


@pytest.mark.parametrize("uri", [":", "nonsense", "test:///default", "foo+bar:///x", "qemu+unix:///system?socket="])
def test_wrong_uri_is_reported(uri: str, state: Path) -> None:
    done = sevhop("status", "--connect", uri, state=state)
    error_of(done)
    assert done.returncode == 1


DAMAGED = {
    "empty": b"",
    "no JSON": b"{'version': 1}\n",
    "list": b"[1, 2]\n",
    "number": b"3\n",
    "other version": b'{"version": [7, "x"]}\n',
    "without fields": b'{"version": %d, "source": {"pid": 1, "started": 1}}\n' % VERSION,
    "wrong source": b'{"version": %d, "source": {"pid": "x", "started": []}}\n' % VERSION,
    "not UTF-8": b'{"version": "\xff"}\n',
    "deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_journal_needs_a_person(content: bytes, state: Path) -> None:
    path = state / "journal" / "domain-x.journal"
    path.write_bytes(content)
    done = sevhop("recover", state=state)
    assert (done.returncode, done.stderr) == (4, "")
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"domain-x.journal: manual action required: cannot read the journal {path}: ")
    assert [part for part in ("Error(", "'", "<class") if part in line] == []
    (found,) = object_of(sevhop("recover", "--json", state=state))["guests"]
    assert found["result"] == "manual"
    assert path.exists()


def test_damaged_journal_can_be_given_up(state: Path) -> None:
    """By the name under which it is reported, by whoever agrees."""
    path = state / "journal" / "domain-x.journal"
    path.write_bytes(b"")
    (found,) = object_of(sevhop("recover", "domain-x.journal", "--json", state=state))["guests"]
    assert "sevhop recover domain-x.journal --discard" in found["detail"]
    refused = sevhop("recover", "domain-x.journal", "--discard", state=state)
    assert (refused.returncode, path.exists()) == (2, True), refused
    done = sevhop("recover", "domain-x.journal", "--discard", "--yes", state=state)
    assert done.stdout == "domain-x.journal: was given up: only its hop: no QEMU was touched\n"
    assert (done.returncode, done.stderr, path.exists()) == (0, "", False)
    assert sevhop("recover", state=state).stdout == "no interrupted hop was found\n"


def test_journal_that_is_no_file_needs_a_person(state: Path) -> None:
    (state / "journal" / "domain-x.journal").mkdir()
    done = sevhop("recover", state=state)
    assert (done.returncode, done.stderr) == (4, "")
    assert "Is a directory" in done.stdout


def test_journals_that_cannot_be_listed_are_reported(state: Path) -> None:
    (state / "journal").rmdir()
    (state / "journal").write_text("")
    for words in (["recover"], ["hop", "--qmp", "/nonexistent"], ["uninstall"]):
        done = sevhop(*words, state=state)
        assert f"cannot read the journals in {state / 'journal'}: Not a directory" in error_of(done)
        assert done.returncode == 1


WORDS = (["--help"], ["upgrade", "--help"], ["--version"])


@pytest.mark.parametrize("words", WORDS, ids=names)
@pytest.mark.parametrize("how", ["closed pipe", "closed"])
def test_reader_that_has_gone_is_no_error(words: list[str], how: str) -> None:
    assert leave_unread(how, words) == (0, "")


@pytest.mark.parametrize("how", ["closed pipe", "closed"])
def test_reader_that_has_gone_does_not_change_the_status(how: str, state: Path) -> None:
    (state / "journal" / "domain-x.journal").write_bytes(b"")
    assert leave_unread(how, ["recover"], state) == (4, "")
    assert leave_unread(how, ["status", "--json", "--connect", NO_DAEMON], state) == (1, "")


def leave_unread(how: str, words: list[str], state: Path | None = None) -> tuple[int, str]:
    """Exit status, and standard error, of a command whose standard output nobody reads."""
    if how == "closed":
        done = sevhop(*words, state=state, preexec_fn=lambda: os.close(1))
    else:
        read_end, write_end = os.pipe()
        os.close(read_end)
        done = sevhop(*words, state=state, stdout=write_end)
        os.close(write_end)
    return done.returncode, done.stderr


@pytest.mark.parametrize("words", WORDS, ids=names)
def test_full_disk_is_reported(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = sevhop(*words, stdout=full)
    assert done.stderr == "sevhop: cannot write to standard output: No space left on device\n"
    assert done.returncode == 1


def test_full_disk_does_not_hide_what_has_become_of_a_guest(state: Path) -> None:
    (state / "journal" / "domain-x.journal").write_bytes(b"")
    with open("/dev/full", "w") as full:
        done = sevhop("recover", "--json", state=state, stdout=full)
    assert done.stderr == "sevhop: cannot write to standard output: No space left on device\n"
    assert done.returncode == 4


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)], ids=str)
def test_closed_standard_files_do_no_harm(closed: tuple[int, ...], state: Path) -> None:
    def close() -> None:
        for number in closed:
            os.close(number)

    done = sevhop("recover", "--json", state=state, preexec_fn=close)
    assert done.returncode == 0
    assert (done.stdout, done.stderr) == ("" if 1 in closed else '{"guests": []}\n', "")


ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PATH": os.defpath}


@pytest.mark.parametrize("variables", [ASCII, ASCII | {"LC_ALL": "C.UTF-8"}], ids=["ASCII", "UTF-8"])
@pytest.mark.parametrize(
    "words",
    [
        ["hop", "--qmp", b"/nonexistent/\xff\xc3\xa4"],
        ["check", "--qmp", b"/nonexistent/\xff\xc3\xa4"],
        ["status", "--connect", b"qemu+unix:///system?socket=/nonexistent/\xff"],
        ["recover", b"/nonexistent/\xff"],
    ],
    ids=lambda words: words[0],
)
def test_names_need_not_be_utf_8(words: list[str | bytes], variables: dict[str, str], state: Path) -> None:
    done = sevhop(*words, state=state, env=variables)
    assert "Traceback" not in done.stderr
    assert len((done.stdout + done.stderr).splitlines()) == 1
    assert "unexpected" not in done.stderr
    assert done.returncode == (0 if words[0] == "recover" else 1)
    assert len(sevhop(*words, "--json", state=state, env=variables).stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "allowed"),
    [
        (["upgrade", "web", "--timeout", "abc"], "seconds"),
        (["hop", "--qmp", "x", "--start-timeout", "1e9"], "seconds"),
        (["recover", "--timeout", "inf"], "seconds"),
        (["upgrade", "web", "--jobs", "two"], "a number from 1 to 64"),
        (["upgrade", "web", "--window", "now"], "HH:MM-HH:MM"),
        (["frobnicate"], "give one of hop, upgrade"),
    ],
    ids=names,
)
def test_invalid_value_is_reported_with_what_is_allowed(words: list[str], allowed: str) -> None:
    done = sevhop(*words)
    error = done.stderr.splitlines()[-1]
    assert ": invalid value: " in error
    assert allowed in error
    assert "'" not in error
    assert (done.returncode, done.stdout) == (2, "")
    found = json.loads(sevhop(*words, "--json").stdout)
    assert (found["outcome"], found["guest_state"]) == ("refused", "untouched")
    assert error.endswith(found["reason"])


@pytest.fixture
def silent_daemon(state: Path) -> Iterator[tuple[socket.socket, str]]:
    """A daemon that accepts connections and says nothing, and the URI for it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(state / "socket"))
        listener.listen()
        listener.settimeout(60)
        yield listener, f"qemu+unix:///system?socket={state / 'socket'}"


@pytest.mark.parametrize("words", [["status"], ["check", "web"], ["upgrade", "--all"]], ids=names)
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["line", "json"])
def test_ctrl_c_is_one_line(words: list[str], more: list[str], silent_daemon: tuple[socket.socket, str]) -> None:
    listener, uri = silent_daemon
    command = [sys.executable, "-m", "sevhop.cli", *words, "--connect", uri, *more]
    # As from a terminal, also where these tests run in the background and ignore it.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, handler)
    with process:
        try:
            connection, _ = listener.accept()
            with connection:
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if more:
        assert object_of(done)["reason"] == "interrupted"
    else:
        assert error_of(done) == "sevhop: interrupted; nothing was touched"
    assert done.returncode == 1


#: What takes long to import.
SLOW = ("asyncio", "tenacity", "qemu.qmp", "libvirt", "rich", "xml", "subprocess", "logging", "importlib.metadata")


@pytest.mark.parametrize("words", [["--help"], ["upgrade", "--help"], ["upgrade", "--jobs", "0"]], ids=names)
def test_help_imports_little(words: list[str]) -> None:
    """Of what Python and the virtual environment have not imported before."""
    script = (
        "import sys; before = set(sys.modules)\n"
        "from sevhop.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    print('\\n', *sorted(set(sys.modules) - before), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    imported = done.stdout.rpartition("\n\n")[2].split()
    assert "sevhop.cli.parser" in imported
    assert [name for name in imported if name.startswith(SLOW)] == []
    ours = {name for name in imported if name.startswith("sevhop")}
    assert ours <= {
        *("sevhop", "sevhop.options", "sevhop_qmp", "sevhop_qmp.time_limits"),
        *(f"sevhop.cli{name}" for name in ("", ".main", ".parser", ".selection", ".terminal", ".exit_codes")),
    }
