"""Puts calls of our C files into a QEMU source tree, at places named by file, function and a few words.

Nothing of QEMU is kept here but what is needed to find the place again. A place that is not found exactly as often as
expected is an error: another version of QEMU must be looked at by a person.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path


class HookError(Exception):
    """The source tree does not look as the hooks expect; the message names the place."""


@dataclass(frozen=True)
class Hook:
    """A change at one place.

    :param file: path in the source tree.
    :param function: whose body has the place; empty: anywhere in the file.
    :param pattern: regular expression for the place, `^` and `$` match at lines.
    :param replacement: as `re.sub` takes it, or computes it.
    :param times: how often the place is there; 0: once or more.
    """

    file: str
    function: str
    pattern: str
    replacement: str | Callable[[re.Match[str]], str]
    times: int = 1

    def __str__(self) -> str:
        where = f"{self.function}() in {self.file}" if self.function else self.file
        return f"{self.pattern!r} in {where}"

    def apply(self, text: str) -> str:
        """The file's text with this change.

        :raise HookError: the place is not there, or not as often as expected.
        """
        start, end = _body(text, self.function) if self.function else (0, len(text))
        changed, found = re.subn(self.pattern, self.replacement, text[start:end], flags=re.MULTILINE)
        if found != self.times if self.times else not found:
            raise HookError(f"{self}: found {found} times instead of {self.times or 'once or more'}")
        return text[:start] + changed + text[end:]


def _body(text: str, function: str) -> tuple[int, int]:
    """Where the body of a C function begins and ends: QEMU has both of its braces in the first column."""
    found = re.findall(rf"^(?!\s)[^;{{}}#/]*\b{function}\([^;{{}}]*\)\s*^{{\n", text, flags=re.MULTILINE)
    if len(found) != 1:
        raise HookError(f"function {function}(): found {len(found)} times instead of 1")
    start = text.index(found[0]) + len(found[0])
    return start, text.index("\n}\n", start) + 1


def _indented(code: str) -> str:
    return "".join(f"\\g<indent>{line}\n" if line else "\n" for line in code.splitlines())


def before(file: str, function: str, words: str, code: str) -> Hook:
    """Insert lines before the line that begins with these words."""
    return Hook(file, function, rf"^(?P<indent>[ \t]*)(?={re.escape(words)})", _indented(code) + r"\g<indent>")


def after(file: str, function: str, words: str, code: str) -> Hook:
    """Insert lines after the statement that begins with these words."""
    pattern = rf"^(?P<indent>[ \t]*)(?P<statement>{re.escape(words)}[^;]*;)\n"
    return Hook(file, function, pattern, r"\g<indent>\g<statement>" + "\n" + _indented(code))


def at_end(file: str, function: str, code: str) -> Hook:
    """Insert lines before the closing brace of a function that returns nothing."""
    return Hook(file, function, r"(?P<indent>)\Z", _indented("".join(f"    {line}\n" for line in code.splitlines())))


def at_start(file: str, function: str, code: str) -> Hook:
    """Insert lines before the first line of a function's body, which must be no declaration."""
    return Hook(file, function, r"\A(?P<indent>[ ]+)", _indented(code) + r"\g<indent>")


def include(file: str, header: str, behind: str) -> Hook:
    """Include a header behind another one."""
    return Hook(file, "", rf'^#include "{re.escape(behind)}"\n', rf'\g<0>#include "{header}"' + "\n")


def apply(tree: Path, hooks: Iterable[Hook]) -> None:
    """Change the files of a source tree.

    :raise HookError: a place is not as expected; files may have been changed by then.
    """
    for hook in hooks:
        file = tree / hook.file
        try:
            text = file.read_text()
        except FileNotFoundError:
            raise HookError(f"{hook}: no such file") from None
        file.write_text(hook.apply(text))
