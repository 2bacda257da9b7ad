"""The pages of the documentation, and their parts: blocks, inline code, tables, links, anchors."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
#: Directories of files that are downloaded or built.
_OTHERS = (".venv", ".cache", "build", "dist", "node_modules")
_PARSER = MarkdownIt("commonmark").enable("table")
#: The end of a paragraph that names the file of the block after it.
_FILE = re.compile(r"`(?P<name>[\w.-]+)`[^`]*:$")
_NOT_IN_ANCHOR = re.compile(r"[^\w\- ]")


@dataclass(frozen=True)
class Block:
    """
    A fenced block.

    :ivar language: the info string of the fence; may be empty.
    :ivar line: of the fence in its page, counted from 1.
    :ivar file: the file name in the paragraph before it; empty if there is none.
    """

    language: str
    text: str
    line: int
    file: str = ""


@dataclass(frozen=True)
class Page:
    """A page in Markdown."""

    path: Path

    @property
    def name(self) -> str:
        """Its path in the tree."""
        return str(self.path.relative_to(ROOT))

    @cached_property
    def _tokens(self) -> list[Token]:
        return _PARSER.parse(self.path.read_text(encoding="utf-8"))

    @cached_property
    def blocks(self) -> list[Block]:
        """All fenced blocks, in order."""
        found, paragraph = [], ""
        for token in self._tokens:
            if token.type == "inline":
                paragraph = token.content
            elif token.type == "fence":
                file = _FILE.search(paragraph)
                assert token.map is not None
                found.append(Block(token.info.strip(), token.content, token.map[0] + 1, file["name"] if file else ""))
                paragraph = ""
        return found

    def of(self, language: str) -> list[Block]:
        """The blocks of one language."""
        return [block for block in self.blocks if block.language == language]

    def _inline(self) -> Iterator[Token]:
        for token in self._tokens:
            yield from token.children or ()

    def code(self) -> list[str]:
        """All inline code."""
        return [token.content for token in self._inline() if token.type == "code_inline"]

    def links(self) -> list[str]:
        """The targets of links and images."""
        attributes = [token.attrs.get("href") or token.attrs.get("src") for token in self._inline()]
        return [str(target) for target in attributes if target]

    @cached_property
    def anchors(self) -> set[str]:
        """The fragments of links: the headings, in the form that forges generate."""
        found: set[str] = set()
        for heading, inline in zip(self._tokens, self._tokens[1:], strict=False):
            if heading.type == "heading_open":
                text = "".join(child.content for child in inline.children or ())
                anchor = base = _NOT_IN_ANCHOR.sub("", text.lower()).replace(" ", "-")
                number = 0
                while anchor in found:
                    number += 1
                    anchor = f"{base}-{number}"
                found.add(anchor)
        return found

    def tables(self) -> list[list[list[str]]]:
        """All tables: rows of cells, as they are written. The first row has the column heads."""
        tables: list[list[list[str]]] = []
        for token in self._tokens:
            if token.type == "table_open":
                tables.append([])
            elif token.type == "tr_open":
                tables[-1].append([])
            elif token.type == "inline" and tables and token.level >= _CELL:
                tables[-1][-1].append(token.content)
        return tables


#: The nesting level of the content of a cell.
_CELL = 4


def page(name: str) -> Page:
    """A page of the tree."""
    return Page(ROOT / name)


@functools.cache
def pages() -> list[Page]:
    """All of them."""
    found = sorted(path for path in ROOT.rglob("*.md") if not set(path.relative_to(ROOT).parts) & set(_OTHERS))
    return [Page(path) for path in found if not any(part.endswith(".egg-info") for part in path.parts)]
