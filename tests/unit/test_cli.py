"""The command line: what is asked for wrongly, and what is not installed."""

from __future__ import annotations

import importlib.util
import json

import pytest
from sevhop import cli

LIBVIRT = (["upgrade", "web"], ["check", "web"], ["status"], ["install"], ["uninstall"])
WRONG: tuple[list[str], ...] = (
    [],
    ["upgrade"],
    ["upgrade", "web", "--all"],
    ["upgrade", "--all", "--outdated"],
    ["upgrade", "--keep-going"],
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
        cli.main(words)
    assert end.value.code == 2
    assert "usage: sevhop" in capsys.readouterr().err


@pytest.mark.parametrize("words", LIBVIRT)
def test_without_libvirt(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 1
    assert "sevhop[libvirt]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["upgrade", "web"], ["upgrade", "--all"], ["upgrade", "--outdated"], ["status"], ["status", "web"]]
)
def test_no_daemon_answers(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*words, "--json", "--connect", "qemu+unix:///system?socket=/nonexistent"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert "nonexistent" in json.dumps(answer)
