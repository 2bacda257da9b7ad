"""Static tests of the pages: links have targets, blocks are valid in their language."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest

from .console import commands
from .pages import ROOT, Block, Page, page, pages

#: Languages of blocks. ``console`` is run, ``xml``, ``json`` and ``python`` are parsed, forges draw ``mermaid``.
_LANGUAGES = {"console", "json", "mermaid", "python", "text", "xml"}
#: A path in the tree.
_IN_TREE = re.compile(r"(debian|docs|plugin|qmp_ext|tests|tools)/[\w./-]*")
#: How a Mermaid diagram may begin.
_DIAGRAM = re.compile(r"(flowchart (LR|TB|TD)|sequenceDiagram|stateDiagram-v2)\n")

ALL = pytest.mark.parametrize("one", pages(), ids=lambda one: one.name)
LINKS = [(one, target) for one in pages() for target in one.links()]


def blocks(language: str) -> list[tuple[str, Block]]:
    return [(f"{one.name}:{block.line}", block) for one in pages() for block in one.of(language)]


@pytest.mark.parametrize(("one", "target"), LINKS, ids=[f"{one.name}-{target}" for one, target in LINKS])
def test_links_have_targets(one: Page, target: str) -> None:
    """A file in the tree, and a heading in it if the link names one. Links to other sites are not resolved."""
    parts = urlsplit(target)
    if parts.scheme:
        assert parts.scheme == "https"
        assert re.fullmatch(r"[a-z0-9.-]+\.[a-z]+", parts.netloc)
        return
    path = (one.path.parent / unquote(parts.path)).resolve() if parts.path else one.path
    assert path.is_relative_to(ROOT)
    assert path.exists()
    if parts.fragment:
        assert parts.fragment in Page(path).anchors


@ALL
def test_files_of_the_tree_exist(one: Page) -> None:
    assert [name for name in one.code() if _IN_TREE.fullmatch(name) and not (ROOT / name).exists()] == []


@ALL
def test_blocks_have_known_languages(one: Page) -> None:
    assert {block.language for block in one.blocks} <= _LANGUAGES


@pytest.mark.parametrize(("where", "block"), blocks("xml"), ids=[where for where, _ in blocks("xml")])
def test_xml_in_pages_is_valid(where: str, block: Block, tmp_path: Path) -> None:
    """A whole domain is valid, a part of one is well-formed."""
    root = ElementTree.fromstring(block.text)
    if root.tag != "domain":
        return
    if shutil.which("xmllint") is None:
        pytest.skip("not installed: xmllint")
    file = tmp_path / "domain.xml"
    file.write_text(block.text)
    done = subprocess.run(["virt-xml-validate", file, "domain"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("where", "block"), blocks("json"), ids=[where for where, _ in blocks("json")])
def test_json_is_valid(where: str, block: Block) -> None:
    json.loads(block.text)


def test_python_in_pages_is_valid() -> None:
    for where, block in blocks("python"):
        ast.parse(block.text, where)


@pytest.mark.parametrize(("where", "block"), blocks("mermaid"), ids=[where for where, _ in blocks("mermaid")])
def test_diagrams_have_known_types(where: str, block: Block) -> None:
    assert _DIAGRAM.match(block.text)


@pytest.mark.parametrize(("where", "block"), blocks("console"), ids=[where for where, _ in blocks("console")])
def test_consoles_have_commands(where: str, block: Block) -> None:
    assert commands(block)


def test_index_names_every_page() -> None:
    index = page("docs/README.md")
    named = {(index.path.parent / urlsplit(target).path).resolve() for target in index.links()}
    assert {one.path for one in pages() if one.path.parent == index.path.parent} - {index.path} <= named
