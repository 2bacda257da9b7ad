"""The command line: what is asked for wrongly, and what is not installed."""

from __future__ import annotations

import importlib.util
import json

import pytest
from sevhop import api
from sevhop.cli import commands
from sevhop.libvirt import connection
from sevhop_qmp.errors import SevhopError

LIBVIRT = (["upgrade", "web"], ["check", "web"], ["status"], ["install"], ["uninstall"])
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
    ["upgrade", "web", "--timeout", "0"],
    ["upgrade", "web", "--timeout", "nan"],
    ["install", "now"],
)


@pytest.mark.parametrize("words", WRONG)
def test_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        commands.main(words)
    assert end.value.code == 2
    assert "usage: sevhop" in capsys.readouterr().err


@pytest.mark.parametrize("words", LIBVIRT)
def test_without_libvirt(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert commands.main(words) == 1
    assert "sevhop[libvirt]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["upgrade", "web"], ["upgrade", "--all"], ["upgrade", "--outdated"], ["status"], ["status", "web"]]
)
def test_no_daemon_answers(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main([*words, "--json", "--connect", "qemu+unix:///system?socket=/nonexistent"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert "nonexistent" in json.dumps(answer)


def test_another_libvirt_than_the_systems(capsys: pytest.CaptureFixture[str]) -> None:
    """libvirt's test driver needs no daemon."""
    assert commands.main(["upgrade", "--all", "--connect", "test:///default"]) == 1
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
def test_which_is_the_systems(uri: str, its: bool) -> None:
    assert connection._is_the_systems(uri) is its


def test_words_of_others_cannot_speak_to_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object, **__: object) -> None:
        raise SevhopError("QEMU says \x1b[2J\r\nsevhop: all is well\x9b \udcff ü")

    monkeypatch.setattr(api, "check", refuse)
    assert commands.main(["check", "--qmp", "/nonexistent"]) == 1
    said = capsys.readouterr().err
    assert said == (
        "sevhop: QEMU says \\x1b[2J\\r\\nsevhop: all is well\\x9b \\udcff ü; nothing was touched\n"
    )
