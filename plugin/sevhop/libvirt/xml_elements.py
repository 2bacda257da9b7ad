"""
XML that is edited in place: its elements with their positions in the text, and replacements of parts of the text.

Everything else stays byte for byte what it was: comments, prefixes, order. Little of the standard library is imported,
because libvirt's hook loads this module during the downtime.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from xml.parsers import expat

NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
_START_TAG = re.compile(rb"<(?:\"[^\"]*\"|'[^']*'|[^>\"'])*>")
_ENTITIES = {"amp": "&", "lt": "<", "gt": ">", "quot": '"', "apos": "'"}
_REFERENCE = re.compile(r"&(?:#x([0-9a-fA-F]+)|#([0-9]+)|([a-z]+));")
#: White space that a parser changes unless it is written as a reference.
_KEPT_WHITE = {character: f"&#{ord(character)};" for character in "\t\n\r"}
_ESCAPED = str.maketrans({character: f"&{name};" for name, character in _ENTITIES.items()} | _KEPT_WHITE)
#: Characters that XML 1.0 does not allow in any form.
_IMPOSSIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
#: The parser's separator of namespace and name; no namespace can contain it.
_SEPARATOR = "\x01"
#: Domain XML has some kilobytes.
_LIMIT = 16 << 20
#: Of nested elements; the parser that libvirt uses allows no more either.
_DEPTH = 256


class DomainXmlError(ValueError):
    """The text is not the XML of a domain."""


@dataclass
class Element:
    """
    An element and its position; offsets in bytes.

    :ivar path: names of its ancestors and itself, those of the ``qemu`` namespace with a leading ``qemu:``.
    :ivar start, end: first byte, and the byte after the last.
    :ivar inner, inner_end: the same of its content.
    """

    path: tuple[str, ...]
    attributes: dict[str, str]
    start: int
    inner: int
    end: int = 0
    inner_end: int = 0
    children: list[Element] = field(default_factory=list)


#: A replacement: first byte, the byte after the last, and the new text.
Edit = tuple[int, int, bytes]


def cut(text: bytes, element: Element) -> Edit:
    """Cut an element out, with the white space in front of it."""
    return len(text[: element.start].rstrip(b" \t\r\n")), element.end, b""


def edited(text: bytes, edits: list[Edit]) -> str:
    """The text with parts of it replaced, which do not overlap."""
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text.decode()


def with_attributes(text: bytes, element: Element, attributes: dict[str, str]) -> Edit:
    """Set some attributes of an element."""
    tag = text[element.start : element.inner].decode()
    for name, value in attributes.items():
        tag = re.sub(rf"\s{name}\s*=\s*(?:'[^']*'|\"[^\"]*\")", "", tag)
        tag = re.sub(r"(\s*/?>)\Z", rf" {name}='{escape(value)}'\1", tag)
    return element.start, element.inner, tag.encode()


def parse(text: bytes) -> list[Element]:
    """
    All elements in document order; the first is the domain.

    :raises DomainXmlError: this is no domain. A document type is refused: it can define entities, which can expand to
        other files or to gigabytes.
    """
    found: list[Element] = []
    stack: list[Element] = []
    parser = expat.ParserCreate("UTF-8", _SEPARATOR)

    def start(name: str, attributes: dict[str, str]) -> None:
        if len(stack) == _DEPTH:
            raise DomainXmlError("the domain XML is nested too deep")
        uri, _, local = name.rpartition(_SEPARATOR)
        label = local if not uri else f"qemu:{local}" if uri == NAMESPACE else f"{uri} {local}"
        at = parser.CurrentByteIndex
        tag = _START_TAG.match(text, at)
        if tag is None:
            raise DomainXmlError("a tag has no end")
        path = (*stack[-1].path, label) if stack else (label,)
        element = Element(path, attributes, at, tag.end())
        if tag[0].endswith(b"/>"):
            element.end = element.inner_end = tag.end()
        if stack:
            stack[-1].children.append(element)
        found.append(element)
        stack.append(element)

    def end(_: str) -> None:
        element = stack.pop()
        if not element.end:
            element.inner_end = parser.CurrentByteIndex
            element.end = text.index(b">", element.inner_end) + 1

    def doctype(*_: object) -> None:
        raise DomainXmlError("domain XML with a document type is refused")

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.StartDoctypeDeclHandler = doctype
    if len(text) > _LIMIT:
        raise DomainXmlError("the domain XML is too long")
    try:
        parser.Parse(text, True)
    except expat.ExpatError as err:
        raise DomainXmlError(f"the domain XML is not well-formed: {err}") from err
    if found[0].path != ("domain",) or not found[0].inner < found[0].end:
        raise DomainXmlError(f"the XML is not that of a domain but of a <{found[0].path[0]}>")
    return found


def encoded(xml: str) -> bytes:
    """:raises DomainXmlError: this was not UTF-8."""
    try:
        return xml.encode()
    except UnicodeEncodeError as err:
        raise DomainXmlError("the domain XML is not UTF-8") from err


def escape(value: str) -> str:
    """:raises DomainXmlError: XML does not allow it."""
    if _IMPOSSIBLE.search(value):
        raise DomainXmlError(f"{value!a} cannot be written in XML")
    return value.translate(_ESCAPED)


def unescape(raw: bytes) -> str:
    def character(reference: re.Match[str]) -> str:
        hexadecimal, decimal, name = reference.groups()
        if name:
            return _ENTITIES.get(name, reference[0])
        return chr(int(hexadecimal, 16) if hexadecimal else int(decimal))

    return _REFERENCE.sub(character, raw.decode()).strip()
