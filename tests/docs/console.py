"""
Blocks of the language ``console``: what is typed into a root's shell, and what it answers.

A line that begins with ``# `` is a command; one that ends with a backslash goes on in the next line. All else is output
and errors, as they come. Every command succeeds, unless ``echo $?`` follows and shows that it does not.

Output is compared word by word, but for what is another thing each time:

========================  ============================================================
a number, a version       stands for any, except in what ``echo`` says
``...`` in a line         stands for any text in this line
========================  ============================================================

QEMU's warnings about the processor are left out: they depend on the machine.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from types import TracebackType
from typing import Self

from .pages import Block

_PROMPT = "# "
_NUMBER = r"\d+(?:\.\d+)*"
_VARIES = re.compile(rf"({_NUMBER}|\.\.\.)")
_WARNING = re.compile(r"^qemu-system-\w+: warning: (host|TCG) doesn't support requested feature")
_STATUS = "echo $?"
#: A command that hangs ends after so many seconds.
_LIMITED = ("timeout", "300")
_END = "this-was-the-output"


@dataclass
class Command:
    """
    A command and its output.

    :ivar line: in its page, counted from 1.
    """

    text: str
    line: int
    output: list[str] = field(default_factory=list)


def commands(block: Block) -> list[Command]:
    """What is typed in a block, with what each command is said to answer."""
    found: list[Command] = []
    goes_on = False
    for number, line in enumerate(block.text.splitlines(), block.line + 1):
        if goes_on:
            found[-1].text += "\n" + line
        elif line.startswith(_PROMPT):
            found.append(Command(line.removeprefix(_PROMPT), number))
        elif found:
            found[-1].output.append(line)
        else:
            raise ValueError(f"line {number}: output before the first command")
        goes_on = (goes_on or line.startswith(_PROMPT)) and line.endswith("\\")
    for command in found:
        while command.output and not command.output[-1]:
            command.output.pop()
    return found


def difference(command: Command, said: str) -> str:
    """How a command's output differs from what the page says; empty if it does not."""
    lines = [line.rstrip() for line in said.splitlines() if not _WARNING.match(line)]
    while lines and not lines[-1]:
        lines.pop()
    exactly = command.text.startswith("echo ")
    for expected, line in zip_longest(command.output, lines):
        if expected is None or line is None or not _matches(expected, line, exactly):
            return f"the page says: {expected!r}\nthe command:   {line!r}"
    return ""


def _matches(expected: str, line: str, exactly: bool) -> bool:
    if exactly:
        return expected == line
    # What varies is every other part.
    *parts, last = _VARIES.split(expected.rstrip())
    pattern = ""
    for fixed, varies in zip(parts[::2], parts[1::2], strict=True):
        pattern += re.escape(fixed) + (".*" if varies == "..." else _NUMBER)
    return re.fullmatch(pattern + re.escape(last), line) is not None


class Shell:
    """
    One bash that commands are typed into, so that each finds what the one before has left: files, ``$?``.

    :param entered: what runs a program where the shell is to be.
    :param paths: what a page calls a file, and what it is called here.
    """

    def __init__(
        self, entered: list[str], environment: Mapping[str, str], directory: str, paths: Mapping[str, str]
    ) -> None:
        variables = [f"{name}={value}" for name, value in environment.items()]
        command = [*entered, *_LIMITED, *("env", "-i", "-C", directory), *variables, "bash", "--norc", "--noprofile"]
        self._paths = paths
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, text: str) -> tuple[int, str]:
        """Type a command. :return: its exit status and its output."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        # $? is afterwards what the command has left.
        stdin.write(f"{{ {self.here(text)}\n}} </dev/null; s=$?; printf '\\n%s %d\\n' {_END} $s; (exit $s)\n")
        stdin.flush()
        lines: list[str] = []
        for line in stdout:
            if line.startswith(f"{_END} "):
                said = "".join(lines).removesuffix("\n")
                for name, path in self._paths.items():
                    said = said.replace(path, name)
                return int(line.split()[1]), said
            lines.append(line)
        raise EOFError(f"the shell has ended: {''.join(lines)}")

    def here(self, text: str) -> str:
        """What stands in a page, with the paths of this machine."""
        for name, path in self._paths.items():
            text = re.sub(rf"(?<![\w/]){re.escape(name)}", path, text)
        return text

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()


def is_status(command: Command) -> bool:
    """Whether it shows how the command before has ended."""
    return command.text == _STATUS
