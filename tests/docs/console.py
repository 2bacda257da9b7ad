"""
Blocks of the language ``console``: commands in root's shell, and their output.

A line that begins with ``# `` is a command; one that ends with a backslash continues in the next line. All other lines
are output, standard error included. Every command succeeds, unless ``echo $?`` follows and shows that it does not.

Output is compared literally, except for what varies:

========================  ============================================================
a number, a version       matches any other, except in the output of ``echo``
``...`` in a line         matches any text in this line
========================  ============================================================

QEMU's warnings about the processor are ignored: they depend on the machine.
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
#: A command that hangs is terminated after so many seconds.
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
    """The commands of a block, with their expected output."""
    found: list[Command] = []
    continued = False
    for number, line in enumerate(block.text.splitlines(), block.line + 1):
        if continued:
            found[-1].text += "\n" + line
        elif line.startswith(_PROMPT):
            found.append(Command(line.removeprefix(_PROMPT), number))
        elif found:
            found[-1].output.append(line)
        else:
            raise ValueError(f"line {number}: output before the first command")
        continued = (continued or line.startswith(_PROMPT)) and line.endswith("\\")
    for command in found:
        while command.output and not command.output[-1]:
            command.output.pop()
    return found


def difference(command: Command, output: str) -> str:
    """How a command's output differs from that in the page; empty if it does not."""
    lines = [line.rstrip() for line in output.splitlines() if not _WARNING.match(line)]
    while lines and not lines[-1]:
        lines.pop()
    exactly = command.text.startswith("echo ")
    for expected, line in zip_longest(command.output, lines):
        if expected is None or line is None or not _matches(expected, line, exactly):
            return f"in the page: {expected!r}\nthe command: {line!r}"
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
    One bash that runs all commands, so that each sees the state that earlier ones have left: files, ``$?``.

    :param entered: the command that enters the namespaces of the shell.
    :param paths: the path of a file in the pages, and its path here.
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
        """Run a command. :return: its exit status and its output."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        # $? must be that of the command for the next one.
        stdin.write(f"{{ {self.here(text)}\n}} </dev/null; s=$?; printf '\\n%s %d\\n' {_END} $s; (exit $s)\n")
        stdin.flush()
        lines: list[str] = []
        for line in stdout:
            if line.startswith(f"{_END} "):
                output = "".join(lines).removesuffix("\n")
                for name, path in self._paths.items():
                    output = output.replace(path, name)
                return int(line.split()[1]), output
            lines.append(line)
        raise EOFError(f"the shell has exited: {''.join(lines)}")

    def here(self, text: str) -> str:
        """Text of a page, with the paths of this machine."""
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
    """Whether it prints the exit status of the command before."""
    return command.text == _STATUS
