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
from sevhop.checks import domain as domain_checks
from sevhop.checks import guest as guest_checks
from sevhop.checks import sev_host
from sevhop.cli import commands as cli_commands
from sevhop.cli import exit_codes, output
from sevhop.cli.parser import parser as whole_parser
from sevhop.engine import hop, upgrade
from sevhop.install import apparmor, host, units
from sevhop.keeper.client import State
from sevhop.records import journal, run_directory

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
    modules = (guest_checks, domain_checks, sev_host, cli_commands)
    made = {name for module in modules for name in findings(module)} | set(sev_host.NAMES)
    assert {cells[0].strip("`") for cells in table("test")} == made


def test_exit_codes() -> None:
    usage = 2  # argparse's
    numbers = {name: value for name, value in vars(exit_codes).items() if isinstance(value, int)}
    codes = {value for name, value in numbers.items() if name.startswith("EXIT_")} | {usage}
    rows = {int(cells[0]): cells[1] for cells in table("exit code")}
    assert set(rows) == codes
    assert {code: state for code, state in rows.items() if state} == output.STATE_OF_GUEST


def test_phases() -> None:
    for module, rows in zip((upgrade, hop), tables("phase"), strict=True):
        phases = re.findall(r'self\._do\("(\w+)"', inspect.getsource(module))
        assert [cells[0] for cells in rows] == phases


def test_outcomes() -> None:
    outcomes = {*exit_codes.EXIT_OF, "done", "checked", "prepared"}
    assert {f"`{outcome}`" for outcome in outcomes} <= set(re.findall(r"`[\w-]+`", GUIDE.path.read_text()))


def test_ends_of_a_recovery() -> None:
    assert {cells[0] for cells in table("it says")} == {end.value for end in recovery_result.End}


def test_states_of_a_keeper() -> None:
    (diagram,) = (block for block in page("docs/how-it-works.md").of("mermaid") if block.text.startswith("state"))
    assert set(re.findall(r"--> (\w+):", diagram.text)) == {state.value for state in State}


def test_files() -> None:
    installed = [host._SCRIPT, apparmor._QEMU.path, apparmor._DAEMONS[0].path, units.DIRECTORY / units.NAMES[0]]
    named = " ".join(cells[0] for cells in table("path"))
    assert [path for path in (*installed, run_directory.RUN, journal.DIRECTORY) if f"`{path}`" not in named] == []


def commands() -> dict[str, argparse.ArgumentParser]:
    """The commands of sevhop, with the options of each."""
    (found,) = (action for action in whole_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def test_every_option_is_mentioned() -> None:
    """In some page, as code or in a block of commands."""
    words = {word for one in pages() for text in one.code() for word in text.split()}
    words |= {word for one in pages() for block in one.of("console") for word in block.text.split()}
    wanted = {name for parser in (whole_parser(), *commands().values()) for name in options(parser)}
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
