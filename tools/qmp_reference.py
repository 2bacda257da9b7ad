#!/usr/bin/env python3
"""
Writes ``docs/qmp.md``, the reference of the QMP commands that adopt.so adds, from their QAPI schema.

The schema, ``qmp_ext/adopt/adopt.json``, is the only source; a test fails when the page differs from it. Run without
arguments after each change of it.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = ROOT / "qmp_ext" / "adopt" / "adopt.json"
PAGE = ROOT / "docs" / "qmp.md"

_INTRODUCTION = """\
# {title}

<!-- Made by tools/qmp_reference.py from qmp_ext/adopt/adopt.json: change that, and run it again. -->

From [adopt.json](../qmp_ext/adopt/adopt.json), the QAPI schema; this page is made of it by `tools/qmp_reference.py`.
What adopt.so is, and how it gets into a QEMU: [its README](../qmp_ext/adopt/README.md). From Python: `sevhop_qmp.adopt`
and `sevhop_qmp.move`.
"""
_DOCUMENTATION = re.compile(r"^##\n(?P<comment>(?:#.*\n)*?)##\n(?P<definition>(?:(?!##$)(?!# ).*\n)*)", re.MULTILINE)
#: QAPI's marks: of what is defined or of a member, and of a section.
_MEMBER = re.compile(r"@(?P<name>[\w-]+):")
_SECTION = re.compile(r"(?P<name>Errors|Example)\b(?P<more>[^:]*):$")
_REFERENCE = re.compile(r"@(?P<name>[\w-]+)")
_TYPES = {"int": "integer", "size": "integer", "str": "string", "bool": "boolean"}


@dataclass
class Definition:
    """
    A command or a type.

    :ivar schema: as QAPI has it.
    :ivar text: what is said of it, paragraphs and lists, in lines.
    :ivar members: name → what is said of it.
    :ivar sections: ``Errors``, ``Example``: its first line's rest, and its lines.
    """

    name: str
    schema: dict[str, Any]
    text: list[str] = field(default_factory=list)
    members: dict[str, list[str]] = field(default_factory=dict)
    sections: dict[str, tuple[str, list[str]]] = field(default_factory=dict)


def definitions(schema: str) -> tuple[str, list[str], list[Definition]]:
    """What a schema defines: its title, the text below that, and all commands and types."""
    title, introduction, found = "", list[str](), list[Definition]()
    for part in _DOCUMENTATION.finditer(schema):
        lines = [line.removeprefix("#").removeprefix(" ") for line in part["comment"].splitlines()]
        if lines[0].startswith("= "):
            title, introduction = lines[0].removeprefix("= "), lines[1:]
        else:
            # QAPI's syntax is a part of Python's.
            found.append(_definition(lines, ast.literal_eval(part["definition"].strip())))
    return title, introduction, found


def _definition(lines: list[str], schema: dict[str, Any]) -> Definition:
    first = _MEMBER.fullmatch(lines[0])
    if first is None or first["name"] != schema.get("command", schema.get("struct")):
        raise ValueError(f"{lines[0]!r} is not of {schema}")
    one = Definition(first["name"], schema)
    into = one.text
    for line in lines[1:]:
        if member := _MEMBER.match(line):
            into = one.members[member["name"]] = [line[member.end() :].strip()]
        elif section := _SECTION.match(line):
            into = []
            one.sections[section["name"]] = (section["more"].strip(), into)
        elif line and not line.startswith(" ") and one.members and into in one.members.values():
            # Not indented, so it is not the member's any more.
            into = one.text
            into += ["", line]
        else:
            into.append(line)
    data = set(_data(schema))
    if data != set(one.members):
        raise ValueError(f"{one.name}: {data ^ set(one.members)} is documented or defined, not both")
    return one


def _data(schema: dict[str, Any]) -> dict[str, str]:
    """Members and how to put their types; QAPI marks those that may be left out by an asterisk."""
    found = schema.get("data", {}).items()
    return {name.removeprefix("*"): _type(kind) + " (optional)" * name.startswith("*") for name, kind in found}


def page(schema: str) -> str:
    """The page for a schema."""
    title, introduction, found = definitions(schema)
    commands = [one for one in found if "command" in one.schema]
    types = [one for one in found if "struct" in one.schema]
    parts = [_INTRODUCTION.format(title=title), *_text(introduction)]
    parts.append("| command | arguments | returns |\n|---|---|---|")
    parts[-1] += "".join(f"\n| [`{one.name}`](#{one.name}) | {_arguments(one)} | {_returns(one)} |" for one in commands)
    for heading, group in (("Commands", commands), ("Types", types)):
        parts.append(f"## {heading}")
        for one in group:
            parts += _of(one)
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _of(one: Definition) -> Iterator[str]:
    yield f"### `{one.name}`"
    yield from _text(one.text)
    if one.members:
        data = _data(one.schema)
        rows = [f"\n| `{name}` | {data[name]} | {_cell(text)} |" for name, text in one.members.items()]
        yield "| member | type | |\n|---|---|---|" + "".join(rows)
    if "returns" in one.schema:
        yield f"Returns: {_returns(one)}"
    for name, (more, lines) in one.sections.items():
        yield f"{name}{f' {more}' if more else ''}:"
        yield from _example(lines) if name == "Example" else _text(lines)


def _arguments(one: Definition) -> str:
    return ", ".join(f"`{name}`: {kind}" for name, kind in _data(one.schema).items()) or "none"


def _returns(one: Definition) -> str:
    return _type(one.schema["returns"]) if "returns" in one.schema else "nothing"


def _type(kind: str | list[str]) -> str:
    if isinstance(kind, list):
        return f"array of {_type(kind[0])}"
    return _TYPES.get(kind) or f"[`{kind}`](#{kind.lower()})"


def _text(lines: list[str]) -> Iterator[str]:
    """Paragraphs, lists, and what is indented, which stands as it is."""
    for block in re.split(r"\n\s*\n", textwrap.dedent("\n".join(lines)).strip("\n")):
        if block.strip():
            literal = block.startswith("  ") and not block.lstrip().startswith("- ")
            yield f"```text\n{textwrap.dedent(block)}\n```" if literal else _marked(textwrap.dedent(block))


def _cell(lines: list[str]) -> str:
    """All of it in one line, as a table wants it."""
    text = " ".join(line.strip() for line in lines if line.strip())
    return _marked(text.replace(" - ", "<br>· ")).replace("|", "\\|")


def _marked(text: str) -> str:
    """References to members and types as code."""
    return _REFERENCE.sub(r"`\g<name>`", text)


def _example(lines: list[str]) -> Iterator[str]:
    """What is sent and what comes back, each whole."""
    said = textwrap.dedent("\n".join(lines)).strip("\n")
    for direction, text in re.findall(r"^(->|<-) (.*(?:\n[ \t].*)*)", said, re.MULTILINE):
        yield "Sent:" if direction == "->" else "Answered:"
        yield f"```json\n{textwrap.dedent('   ' + text)}\n```"


if __name__ == "__main__":
    PAGE.write_text(page(SCHEMA.read_text(encoding="utf-8")), encoding="utf-8")
