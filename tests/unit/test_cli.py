"""The command line: wrong usage, and missing software."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys

import pytest
from sevhop import api
from sevhop.cli.main import main
from sevhop.libvirt import daemon
from sevhop_qmp.errors import SevhopError

LIBVIRT = (["upgrade", "web"], ["prepare", "web"], ["check", "web"], ["status"], ["install"], ["uninstall"])
WRONG: tuple[list[str], ...] = (
    [],
    ["upgrade"],
    ["upgrade", "web", "--all"],
    ["upgrade", "--all", "--outdated"],
    ["upgrade", "--keep-going"],
    ["upgrade", "--all", "--jobs", "0"],
    ["upgrade", "--all", "--jobs", "many"],
    ["check"],
    ["check", "web", "--qmp", "/run/qmp"],
    ["hop"],
    ["hop", "--qmp", "/run/qmp", "--emulator", "/usr/bin/qemu", "--", "/usr/local/bin/qemu"],
    ["hop", "--qmp", "/run/qmp", "/usr/bin/qemu"],
    ["hop", "--qmp", "/run/qmp", "/usr/bin/qemu", "-m", "1"],
    ["hop", "--qmp", "/run/qmp", "--"],
    ["upgrade", "web", "--timeout", "0"],
    ["upgrade", "web", "--timeout", "nan"],
    ["install", "now"],
    ["prepare"],
    ["prepare", "web", "--all"],
    ["prepare", "web", "--exclude", "w*"],
    ["recover", "--discard", "--yes"],
    ["recover", "one", "two", "--discard", "--yes"],
    ["recover", "one", "--yes"],
    ["recover", "one", "--discard"],  # pytest has no terminal
    ["recover", "one", "--discard", "--yes", "--emulator", "/usr/bin/qemu"],
    ["recover", "one", "--discard", "--yes", "--unattended"],
    ["recover", "--emulator", "/usr/bin/qemu"],
    ["recover", "--max-age", "0"],
)


@pytest.mark.parametrize("argv", WRONG)
def test_wrong_usage_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert "usage: sevhop" in capsys.readouterr().err


def test_command_does_not_begin_if_it_may_open_few_files() -> None:
    """It would fail somewhere, and not know where the guest is."""
    begin = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv.pop(1)),) * 2)"
    script = f"{begin}; from sevhop.cli import main; main.program()"
    command = [sys.executable, "-c", script, "40", "hop", "--qmp", "/run/qmp"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    expected = "sevhop: only 40 files may be open at a time (raise that limit: ulimit -Hn); nothing was touched\n"
    assert done.stderr == expected


def test_selections_that_exclude_each_other_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Both were given: "name domains, or give --all" reads as if none was."""
    with pytest.raises(SystemExit):
        main(["upgrade", "--all", "web"])
    assert "one of the three" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["upgrade"], "name domains, or give --all or --outdated: one of the three"),
        (["upgrade", "--all", "--outdated"], "name domains, or give --all or --outdated: one of the three"),
        (["upgrade", "web", "--exclude", "w*"], "--exclude goes with --all or --outdated"),
        (["prepare"], "name domains, or give --all: one of the two"),
        (["prepare", "web", "--all"], "name domains, or give --all: one of the two"),
        (["prepare", "web", "--exclude", "w*"], "--exclude goes with --all"),
    ],
)
def test_wrong_selection_is_reported_with_the_rules_of_the_command(
    argv: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(argv)
    assert capsys.readouterr().err.endswith(f"sevhop {argv[0]}: error: {reason}\n")


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--timeout", "soon", "give seconds, above 0 and below 86400"),
        ("--timeout", "0", "give seconds, above 0 and below 86400"),
        ("--jobs", "many", "give a number from 1 to 64"),
        ("--jobs", "65", "give a number from 1 to 64"),
    ],
)
def test_wrong_number_is_reported_with_what_is_allowed(
    option: str, value: str, allowed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["upgrade", "web", option, value])
    assert capsys.readouterr().err.endswith(f"error: argument {option}: invalid value: {value}: {allowed}\n")


@pytest.mark.parametrize("argv", LIBVIRT)
def test_missing_libvirt_package_is_reported(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert main(argv) == 1
    assert "sevhop[libvirt]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["upgrade", "web"],
        ["upgrade", "--all"],
        ["upgrade", "--outdated"],
        ["status"],
        ["status", "web"],
        ["prepare", "web"],
    ],
)
def test_missing_daemon_is_reported(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*argv, "--json", "--connect", "qemu+unix:///system?socket=/nonexistent"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert "nonexistent" in json.dumps(answer)


def test_foreign_libvirt_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """libvirt's test driver needs no daemon."""
    assert main(["upgrade", "--all", "--connect", "test:///default"]) == 1
    assert "test:///default is not the system's QEMU on this host" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("uri", "its"),
    [
        ("qemu:///system", True),
        ("qemu+unix:///system?socket=/run/libvirt/virtqemud-sock", True),
        ("qemu:///session", False),
        ("qemu+unix:///session?socket=/run/user/1000/libvirt/libvirt-sock", False),
        ("qemu+ssh://root@host/system", False),
        ("qemu:///systemwide", False),
        ("xen:///system", False),
    ],
)
def test_system_libvirt_is_recognized(uri: str, its: bool) -> None:
    assert daemon.is_the_systems(uri) is its


def test_control_characters_are_escaped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: object, **__: object) -> None:
        raise SevhopError("QEMU says \x1b[2J\r\nsevhop: all is well\x9b \udcff ü")

    monkeypatch.setattr(api, "check", refuse)
    assert main(["check", "--qmp", "/nonexistent"]) == 1
    error = capsys.readouterr().err
    assert error == ("sevhop: QEMU says \\x1b[2J\\r\\nsevhop: all is well\\x9b \\udcff ü; nothing was touched\n")


@pytest.mark.parametrize(
    ("argv", "given"),
    [
        ([], {"unattended": False, "max_age": None}),
        (["--unattended"], {"unattended": True, "max_age": 3600.0}),
        (["--unattended", "--max-age", "60"], {"unattended": True, "max_age": 60.0}),
        (["web", "--max-age", "60", "--no-set-time"], {"max_age": 60.0, "set_time": False}),
        (["web", "--emulator", "/q"], {"emulator": "/q", "set_time": True}),
    ],
)
def test_options_of_recover_are_passed_on(
    argv: list[str], given: dict[str, object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passed: dict[str, object] = {}

    async def recover(guests: list[str], **options: object) -> list[api.RecoveredGuest]:
        passed.update(options)
        return [api.RecoveredGuest("web", api.RecoveryOutcome.POSTPONED, "a reason")]

    monkeypatch.setattr(api, "recover", recover)
    assert main(["recover", *argv]) == 4
    assert passed | given == passed
    assert capsys.readouterr().out == "web: not tried again yet: a reason\n"


@pytest.mark.parametrize(("answer", "status"), [("y\n", 0), ("yes\n", 0), ("\n", 1), ("no\n", 1), ("", 1)])
def test_discard_needs_somebody_who_agrees(
    answer: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    done: list[str] = []

    async def assess(guest: str, **_: float) -> api.Loss:
        return api.Loss(guest, "transit", "the guest runs in the transit")

    async def discard(loss: api.Loss, **_: float) -> api.RecoveredGuest:
        done.append(loss.guest)
        return api.RecoveredGuest(loss.guest, api.RecoveryOutcome.DISCARDED)

    monkeypatch.setattr(api, "assess_discard", assess)
    monkeypatch.setattr(api, "discard", discard)
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert main(["recover", "web", "--discard"]) == status
    out, err = capsys.readouterr()
    assert err.startswith("web: the guest runs in the transit\nGive up the guest? [y/N] ")
    assert (done, out) == ((["web"], "web: was given up\n") if status == 0 else ([], ""))
    assert status == 0 or err.endswith("the guest was not given up; nothing was touched\n")
