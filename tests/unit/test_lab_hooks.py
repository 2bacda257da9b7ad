"""Hooks of the lab's processor into QEMU's source (tools/lab/processor): each goes to its place, or nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from lab.processor.__main__ import change
from lab.processor.hooks import Hook, HookError, after, at_end, at_start, before, include
from lab.processor.places import HOOKS

SOURCE = """\
#include "first.h"
#include "second.h"

static int other(int x)
{
    return twice(x);
}

void target(CPUState *env,
            int x)
{
    first(env);
    switch (x) {
    case 1:
        state->value = compute(x,
                               env);
        break;
    }
    last(env);
}
"""


def changed(hook: Hook) -> list[str]:
    """The lines that a hook adds."""
    lines = hook.apply(SOURCE).splitlines()
    for line in SOURCE.splitlines():
        lines.remove(line)
    return lines


def test_line_is_inserted_before_words() -> None:
    text = before("f", "target", "switch (", "one();\ntwo();").apply(SOURCE)
    assert "    first(env);\n    one();\n    two();\n    switch (x) {\n" in text


def test_line_is_inserted_after_a_statement_of_two_lines() -> None:
    text = after("f", "target", "state->value =", "one();").apply(SOURCE)
    assert "env);\n        one();\n        break;\n" in text


def test_line_is_inserted_at_the_start_of_a_function() -> None:
    assert "{\n    one();\n    first(env);\n" in at_start("f", "target", "one();").apply(SOURCE)


def test_line_is_inserted_at_the_end_of_a_function() -> None:
    assert "    last(env);\n    one();\n}\n" in at_end("f", "target", "one();").apply(SOURCE)
    assert changed(at_end("f", "target", "one();")) == ["    one();"]


def test_header_is_included_behind_another() -> None:
    text = include("f", "ours.h", behind="first.h").apply(SOURCE)
    assert text.startswith('#include "first.h"\n#include "ours.h"\n#include "second.h"\n')


def test_place_of_another_function_is_not_taken() -> None:
    with pytest.raises(HookError, match=r"return.*target\(\) in f: found 0 times instead of 1"):
        before("f", "target", "return", "one();").apply(SOURCE)


@pytest.mark.parametrize(("times", "found"), [(1, True), (2, False), (0, True)])
def test_place_is_counted(times: int, found: bool) -> None:
    hook = Hook("f", "", "twice", "thrice", times)
    if found:
        assert "thrice" in hook.apply(SOURCE)
        return
    with pytest.raises(HookError, match="found 1 times instead of 2"):
        hook.apply(SOURCE)


def test_place_that_is_missing_is_an_error_whatever_the_number() -> None:
    with pytest.raises(HookError, match="found 0 times instead of once or more"):
        Hook("f", "", "absent", "", times=0).apply(SOURCE)


@pytest.mark.parametrize("function", ["absent", "twice"])
def test_function_that_is_not_defined_is_an_error(function: str) -> None:
    with pytest.raises(HookError, match="found 0 times"):
        at_end("f", function, "one();").apply(SOURCE)


def test_another_version_of_qemu_is_refused(tmp_path: Path) -> None:
    (tmp_path / "VERSION").write_text("9.2.4\n")
    with pytest.raises(HookError, match=r"the source is QEMU 9\.2\.4, and the hooks are for 10\.0"):
        change(tmp_path)


def test_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "VERSION").write_text("10.0.13\n")
    with pytest.raises(HookError, match="no such file"):
        change(tmp_path)


def test_hooks_have_no_more_than_two_lines_of_words() -> None:
    """What is QEMU's stays out of this tree: a place is named by a few words."""
    assert all(len(hook.pattern) < 200 for hook in HOOKS)
