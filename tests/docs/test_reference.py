"""Tables in the pages agree with the code: tests of ``sevhop check``, phases, exit codes, states, messages, options."""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import qmp_reference
import sevhop
import sevhop_qmp
from sevhop.checks import domain as domain_checks
from sevhop.checks import earlier_hop, reboot, registers, restart, sev_host
from sevhop.checks import guest as guest_checks
from sevhop.cli import exit_codes
from sevhop.cli.parser import parser as whole_parser
from sevhop.engine import hop, recovery_result, upgrade
from sevhop.errors import GuestState
from sevhop.install import apparmor, units, verification
from sevhop.keeper.state import State
from sevhop.records import journal, run_directory

from .pages import page, pages

GUIDE = page("docs/administrator.md")


def tables(head: str) -> list[list[list[str]]]:
    """The rows of the tables in the guide with this first column head."""
    return [rows for heads, *rows in GUIDE.tables() if heads[0] == head]


def table(head: str) -> list[list[str]]:
    """The rows of the only such table."""
    (found,) = tables(head)
    return found


def check_names(module: ModuleType) -> Iterator[str]:
    """The names of the check results of a module: the first argument of ``passed`` and ``failed``."""
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


def test_tests_of_check_are_explained() -> None:
    modules = (earlier_hop, guest_checks, domain_checks, reboot, registers, restart, sev_host)
    made = {name for module in modules for name in check_names(module)} | set(sev_host.NAMES)
    assert {cells[0].strip("`") for cells in table("test")} == made


def test_exit_codes_are_those_of_the_command() -> None:
    usage = 2  # argparse's
    codes = {outcome: str(code) for outcome, code in exit_codes.EXIT_OF.items()}
    codes |= {"done": str(exit_codes.EXIT_DONE), "": str(usage)}
    assert {cells[1].strip("`"): cells[0] for cells in table("exit code")} == codes


def test_guest_states_are_explained() -> None:
    assert [cells[0] for cells in table("the guest is")] == [state.value for state in GuestState]


def test_phases_are_those_of_the_engines() -> None:
    by_image: list[Callable[..., object]] = [upgrade.Upgrade._script, upgrade.Upgrade._by_image]
    scripts: tuple[list[Callable[..., object]], ...] = (
        by_image,
        [hop.HopPhases._script],
        [upgrade.Upgrade._by_transit],
    )
    documented = [[cells[0] for cells in rows] for rows in tables("phase")]
    assert documented[2].pop(0) == "check to finish"  # the first hop
    for functions, phases in zip(scripts, documented, strict=True):
        source = "".join(inspect.getsource(function) for function in functions)
        assert phases == re.findall(r'self\.run_phase\(\s*"(\w+)"', source)


def test_outcomes_are_mentioned() -> None:
    outcomes = {*exit_codes.EXIT_OF, "done", "checked", "prepared"}
    assert {f"`{outcome}`" for outcome in outcomes} <= set(re.findall(r"`[\w-]+`", GUIDE.path.read_text()))


def texts() -> Iterator[str]:
    """All string literals of the packages, as far as they are constant."""
    for package in (sevhop, sevhop_qmp):
        for path in Path(package.__path__[0]).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


#: What the messages in the guide have in the place of a value.
_VALUE = re.compile(r"\b(?:COMMAND|DISK|GUEST|IMAGE|NAME|PATH|PHASE|PID|REASON|SECONDS|STATE|TYPE|VERSION)\b|\.\.\.")


def constant_parts(message: str) -> list[str]:
    """The parts of a message in the guide between the values."""
    return [part for part in _VALUE.split(message) if part.strip(" :;,()")]


def test_messages_are_those_of_the_code() -> None:
    found = "\n".join(texts())
    messages = [cells[0].strip("`") for rows in tables("message") for cells in rows]
    assert messages
    assert [part for message in messages for part in constant_parts(message) if part not in found] == []


def test_results_of_a_recovery_are_explained() -> None:
    assert {cells[0] for cells in table("result")} == {end.value for end in recovery_result.RecoveryOutcome}


def test_states_of_the_keeper_are_in_the_diagram() -> None:
    (diagram,) = (block for block in page("docs/how-it-works.md").of("mermaid") if block.text.startswith("state"))
    assert set(re.findall(r"--> (\w+):", diagram.text)) == {state.value for state in State}


def test_installed_files_are_listed() -> None:
    installed = [verification.SCRIPT, apparmor._QEMU.path, apparmor._DAEMONS[0].path, units.DIRECTORY / units.NAMES[0]]
    named = " ".join(cells[0] for cells in table("path"))
    assert [path for path in (*installed, run_directory.RUN, journal.DIRECTORY) if f"`{path}`" not in named] == []


def commands() -> dict[str, argparse.ArgumentParser]:
    """The commands of sevhop, with the options of each."""
    (found,) = (action for action in whole_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def test_options_are_mentioned() -> None:
    """In any page, as code or in a block of commands."""
    words = {word for one in pages() for text in one.code() for word in text.split()}
    words |= {word for one in pages() for block in one.of("console") for word in block.text.split()}
    wanted = {name for parser in (whole_parser(), *commands().values()) for name in options(parser)}
    assert wanted - words <= {"-h", "--help", "-v"}


CALLS = [(one.name, text) for one in pages() for text in one.code() if re.match(r"sevhop [a-z]", text)]


@pytest.mark.parametrize(("name", "text"), CALLS)
def test_mentioned_options_exist(name: str, text: str) -> None:
    """A command of sevhop in the text, and its options there."""
    _, command, *arguments = text.split()
    parser = commands()[command]
    assert {word for word in arguments if word.startswith("--") and word != "--"} <= options(parser), name


def test_qmp_reference_is_current() -> None:
    """To generate it: python3 tools/qmp_reference.py"""
    assert qmp_reference.PAGE.read_text() == qmp_reference.page(qmp_reference.SCHEMA.read_text())
