"""What the pages list is what the code has: tests of ``sevhop check``, phases, exit codes, outcomes, options."""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from collections.abc import Iterator
from types import ModuleType

import pytest
import qmp_reference
from sevhop import (
    apparmor,
    check,
    cli,
    domain_check,
    hop,
    installation,
    journal,
    recover,
    run_directory,
    sev_host,
    units,
    upgrade,
)
from sevhop.keeper_process import State

from .pages import page, pages

GUIDE = page("docs/administrator.md")


def tables(head: str) -> list[list[list[str]]]:
    """The rows of the tables in the guide whose first head this is."""
    return [rows for heads, *rows in GUIDE.tables() if heads[0] == head]


def table(head: str) -> list[list[str]]:
    """The same if there is one."""
    (found,) = tables(head)
    return found


def findings(module: ModuleType) -> Iterator[str]:
    """The names of the findings that a module can make: what ``passed`` and ``failed`` are called with."""
    for function in ast.walk(ast.parse(inspect.getsource(module))):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        names = {
            target.id: node.value.value
            for node in ast.walk(function)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for call in ast.walk(function):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ("passed", "failed"):
                first = call.args[0]
                name = names[first.id] if isinstance(first, ast.Name) else ast.literal_eval(first)
                assert isinstance(name, str)
                yield name


def test_every_test_of_check_is_explained() -> None:
    made = {name for module in (check, domain_check, sev_host, cli) for name in findings(module)} | set(sev_host.NAMES)
    assert {cells[0].strip("`") for cells in table("test")} == made


def test_exit_codes() -> None:
    usage = 2  # argparse's
    numbers = {name: value for name, value in vars(cli).items() if isinstance(value, int)}
    codes = {value for name, value in numbers.items() if name.startswith("EXIT_")} | {usage}
    rows = {int(cells[0]): cells[1] for cells in table("exit code")}
    assert set(rows) == codes
    assert {code: state for code, state in rows.items() if state} == cli._STATE_OF_GUEST


def test_phases() -> None:
    for module, rows in zip((upgrade, hop), tables("phase"), strict=True):
        phases = re.findall(r'self\._do\("(\w+)"', inspect.getsource(module))
        assert [cells[0] for cells in rows] == phases


def test_outcomes() -> None:
    outcomes = {*cli.EXIT_OF, "done", "checked", "prepared"}
    assert {f"`{outcome}`" for outcome in outcomes} <= set(re.findall(r"`[\w-]+`", GUIDE.path.read_text()))


def test_ends_of_a_recovery() -> None:
    assert {cells[0] for cells in table("it says")} == {end.value for end in recover.End}


def test_states_of_a_keeper() -> None:
    (diagram,) = (block for block in page("docs/how-it-works.md").of("mermaid") if block.text.startswith("state"))
    assert set(re.findall(r"--> (\w+):", diagram.text)) == {state.value for state in State}


def test_files() -> None:
    installed = [installation._SCRIPT, apparmor._QEMU.path, apparmor._DAEMONS[0].path, units.DIRECTORY / units.NAMES[0]]
    named = " ".join(cells[0] for cells in table("path"))
    assert [path for path in (*installed, run_directory.RUN, journal.DIRECTORY) if f"`{path}`" not in named] == []


def commands() -> dict[str, argparse.ArgumentParser]:
    """The commands of sevhop, with the options of each."""
    (found,) = (action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def test_every_option_is_mentioned() -> None:
    """In some page, as code or in a block of commands."""
    words = {word for one in pages() for text in one.code() for word in text.split()}
    words |= {word for one in pages() for block in one.of("console") for word in block.text.split()}
    wanted = {name for parser in (cli.parser(), *commands().values()) for name in options(parser)}
    assert wanted - words <= {"-h", "--help", "-v"}


CALLS = [(one.name, text) for one in pages() for text in one.code() if re.match(r"sevhop [a-z]", text)]


@pytest.mark.parametrize(("name", "text"), CALLS)
def test_what_is_mentioned_exists(name: str, text: str) -> None:
    """A command of sevhop in the text, and each option that it is mentioned with."""
    _, command, *words = text.split()
    parser = commands()[command]
    assert {word for word in words if word.startswith("--") and word != "--"} <= options(parser), name


def test_qmp_reference() -> None:
    """To make it anew: python3 tools/qmp_reference.py"""
    assert qmp_reference.PAGE.read_text() == qmp_reference.page(qmp_reference.SCHEMA.read_text())
