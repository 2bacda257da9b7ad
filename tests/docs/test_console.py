"""Which output matches that in a page, and which does not."""

from __future__ import annotations

import pytest

from .console import Command, commands, difference
from .pages import Block

PAGE = Block("console", "# first \\\n    --option\noutput\n\n# echo $?\n1\n# silent\n", 10)


def test_commands_are_found_in_a_block() -> None:
    first, status, silent = commands(PAGE)
    assert (first.text, first.line, first.output) == ("first \\\n    --option", 11, ["output"])
    assert (status.text, status.line, status.output) == ("echo $?", 15, ["1"])
    assert (silent.text, silent.output) == ("silent", [])


def test_output_without_a_command_is_an_error() -> None:
    with pytest.raises(ValueError, match="line 2"):
        commands(Block("console", "output\n# command\n", 1))


@pytest.mark.parametrize(
    ("expected", "output"),
    [
        ("QEMU 7.2.22 -> 10.0.13; 9.3 ms", "QEMU 8.0.1 -> 10.0.2; 16 ms"),
        ("image /run/.../image", "image /run/0a1b/image"),
        ("", "qemu-system-x86_64: warning: host doesn't support requested feature: CPUID.01H:ECX.pni [bit 0]"),
        ("two\n\nlines", "two\n\nlines\n\n"),
    ],
)
def test_output_matches_whatever_its_numbers_and_ids_are(expected: str, output: str) -> None:
    assert not difference(Command("sevhop", 1, expected.splitlines()), output)


@pytest.mark.parametrize(
    ("command", "expected", "output"),
    [
        ("sevhop", "2 domains: 2 done", "2 domains: 1 refused, 1 done"),
        ("sevhop", "web1: up to date", "web1: up to date, or not"),
        ("sevhop", "one", "one\ntwo"),
        ("sevhop", "one\ntwo", "one"),
        ("sevhop", "9.3 ms", "9.3 s"),
        ("echo $?", "3", "1"),
    ],
)
def test_output_differs_if_a_word_or_a_unit_does(command: str, expected: str, output: str) -> None:
    assert difference(Command(command, 1, expected.splitlines()), output)
