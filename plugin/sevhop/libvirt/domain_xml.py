"""
Domain XML, read and changed in those few places that a hop is about.

The text is edited in place instead of being parsed and written again, so that everything else stays byte for byte what
the administrator wrote: comments, prefixes, order. Little of the standard library is imported, because libvirt's hook
loads this module during the downtime.

A destination gets environment variables for adopt.so, in libvirt's own ``qemu`` namespace
(https://libvirt.org/drvqemu.html#pass-through-of-arbitrary-qemu-commands). They stay in the XML of the running domain,
and in its copies, where they have no effect (``qmp_ext/adopt/domain.c``). :func:`for_destination` removes those of
earlier hops.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.parsers import expat

NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
_START_TAG = re.compile(rb"<(?:\"[^\"]*\"|'[^']*'|[^>\"'])*>")
_LIBRARY = "adopt.so"
_COMMANDLINE = ("domain", "qemu:commandline")
_ENV = (*_COMMANDLINE, "qemu:env")
_INTERFACE = ("domain", "devices", "interface")
_GRAPHICS = ("domain", "devices", "graphics")
#: Devices that may write to a file. Those and others may also have a log.
_CHARACTER = tuple((name,) for name in ("serial", "parallel", "console", "channel", "redirdev", "smartcard"))
#: Prefix of the environment variables of a destination, but for LD_PRELOAD.
_MARK = "SEVHOP_"
#: Where it opens a monitor for the keeper.
MONITOR = "SEVHOP_MONITOR"
#: The numbers of its displays whose ports libvirt has chosen.
_AUTOPORT = "SEVHOP_AUTOPORT"
_PORTS = ("port", "tlsPort")
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
class _Element:
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
    children: list[_Element] = field(default_factory=list)


@dataclass(frozen=True)
class Description:
    """
    What a hop needs to know of a domain. Empty where it is not in the XML.

    :ivar kind: ``kvm`` or ``qemu``.
    """

    name: str
    uuid: str
    kind: str
    arch: str
    machine: str
    emulator: str
    on_reboot: str = ""
    on_poweroff: str = ""
    on_crash: str = ""


def describe(xml: str) -> Description:
    """:raises DomainXmlError: this is no domain."""
    text = _encoded(xml)
    elements = _elements(text)

    def content(*path: str) -> str:
        found = next((one for one in elements if one.path == ("domain", *path)), None)
        return _unescape(text[found.inner : found.inner_end]) if found else ""

    kind = next(one for one in elements if one.path == ("domain", "os", "type")) if content("os", "type") else None
    return Description(
        name=content("name"),
        uuid=content("uuid"),
        kind=elements[0].attributes.get("type", ""),
        arch=kind.attributes.get("arch", "") if kind else "",
        machine=kind.attributes.get("machine", "") if kind else "",
        emulator=content("devices", "emulator"),
        on_reboot=content("on_reboot"),
        on_poweroff=content("on_poweroff"),
        on_crash=content("on_crash"),
    )


def with_emulator(xml: str, emulator: str) -> str:
    """
    The same domain with another emulator.

    :raises DomainXmlError: this is no domain, or one without an emulator, or XML cannot have such a path.
    """
    text = _encoded(xml)
    for element in _elements(text):
        if element.path == ("domain", "devices", "emulator"):
            return (text[: element.inner] + _escape(emulator).encode() + text[element.inner_end :]).decode()
    raise DomainXmlError("the domain has no <emulator>")


def ports(xml: str) -> list[dict[str, str]]:
    """
    The ports of each display of a running domain. They are not in the XML of a save image.

    :raises DomainXmlError: this is no domain.
    """
    graphics = [one for one in _elements(_encoded(xml)) if one.path == _GRAPHICS]
    return [
        {name: value for name in _PORTS if (value := one.attributes.get(name, "")).isdigit() and int(value)}
        for one in graphics
    ]


def for_destination(
    xml: str, emulator: str, environment: dict[str, str], monitor: str, displays: Sequence[dict[str, str]] = ()
) -> str:
    """
    The domain of a destination. A display whose port libvirt has chosen keeps it: a client that connects to it again
    must find the same guest. Files that devices write to are appended to: libvirt empties them when it starts a domain.

    :param environment: of QEMU, in addition to the domain's own.
    :param monitor: path of the socket of the monitor for the keeper.
    :param displays: the source's :func:`ports`.
    :raises DomainXmlError: this is no domain, or one without an emulator.
    """
    text = with_emulator(without_additions(xml), emulator).encode()
    environment = {**environment, MONITOR: monitor}
    edits: list[_Edit] = []
    for element in _elements(text):
        # A variable can be set once; libraries that the domain preloads stay preloaded.
        if element.path == _ENV and element.attributes.get("name") == "LD_PRELOAD" and "LD_PRELOAD" in environment:
            environment["LD_PRELOAD"] += f":{element.attributes.get('value', '')}"
            edits.append(_cut(text, element))
    graphics = [element for element in _elements(text) if element.path == _GRAPHICS]
    kept = []
    for number, (element, has) in enumerate(zip(graphics, displays, strict=False)):
        if element.attributes.get("autoport") == "yes" and has:
            kept.append(str(number))
            edits.append(_with_attributes(text, element, {**has, "autoport": "no"}))
    if kept:
        environment[_AUTOPORT] = ",".join(kept)
    edits += [_with_attributes(text, element, {"append": "on"}) for element in _logs(_elements(text))]
    added = "".join(f"<q:env name='{_escape(name)}' value='{_escape(v)}'/>" for name, v in environment.items())
    end = _elements(text)[0].inner_end
    edits.append((end, end, f"<q:commandline xmlns:q='{NAMESPACE}'>{added}</q:commandline>\n".encode()))
    return _edited(text, edits)


def _logs(elements: Sequence[_Element]) -> list[_Element]:
    """The elements that name a file that a device writes to."""
    inside = [one for one in elements if one.path[:2] == ("domain", "devices")]
    found = [one for one in inside if one.path[-1] == "log" and "file" in one.attributes]
    for device in (one for one in inside if one.path[2:] in _CHARACTER and one.attributes.get("type") == "file"):
        found += [child for child in device.children if child.path[3] == "source"]
    return found


def without_additions(xml: str) -> str:
    """
    The domain without what hops have added to it.

    :raises DomainXmlError: this is no domain.
    """
    text = _encoded(with_chosen_ports(xml))
    edits: list[_Edit] = []
    for commandline in (one for one in _elements(text) if one.path == _COMMANDLINE):
        ours: list[_Element] = []
        for child in commandline.children:
            value = child.attributes.get("value", "")
            if _is_mark(child):
                ours.append(child)
            elif child.path == _ENV and child.attributes.get("name") == "LD_PRELOAD":
                others = [path for path in value.split(":") if not path.endswith(f"/{_LIBRARY}")]
                if not others:
                    ours.append(child)
                else:
                    prefix = text[child.start :].split(None, 1)[0].decode()
                    shorter = f"{prefix} name='LD_PRELOAD' value='{_escape(':'.join(others))}'/>"
                    edits.append((child.start, child.end, shorter.encode()))
        whole = len(ours) == len(commandline.children) > 0
        edits += [_cut(text, element) for element in ([commandline] if whole else ours)]
    return _edited(text, edits)


def marks(xml: str) -> dict[str, str]:
    """
    What a hop has left in a domain: the environment variables, without LD_PRELOAD.

    :raises DomainXmlError: this is no domain.
    """
    found = (one.attributes for one in _elements(_encoded(xml)) if _is_mark(one))
    return {attributes["name"]: attributes.get("value", "") for attributes in found}


def with_mark_renamed(xml: str, mark: str, new: str) -> str:
    """
    The domain in which one of those variables has another name.

    :param mark, new: made of letters that XML has no other form for.
    :raises DomainXmlError: this is no domain.
    """
    text = _encoded(xml)
    named = [one for one in _elements(text) if _is_mark(one) and one.attributes["name"] == mark]
    edits = []
    for element in named:
        tag = text[element.start : element.inner]
        edits.append((element.start, element.inner, tag.replace(mark.encode(), new.encode(), 1)))
    return _edited(text, edits)


def _is_mark(element: _Element) -> bool:
    return element.path == _ENV and element.attributes.get("name", "").startswith(_MARK)


def with_chosen_ports(xml: str) -> str:
    """
    The domain of a destination, in which libvirt chooses those ports again that it chose before the hop.

    :raises DomainXmlError: this is no domain.
    """
    text = _encoded(xml)
    elements = _elements(text)
    kept = [one for one in elements if _is_mark(one) and one.attributes["name"] == _AUTOPORT]
    chosen = {number for mark in kept for number in mark.attributes.get("value", "").split(",")}
    graphics = [one for one in elements if one.path == _GRAPHICS]
    ours = [one for number, one in enumerate(graphics) if str(number) in chosen]
    return _edited(text, [_with_attributes(text, one, {"autoport": "yes"}) for one in ours])


def _with_attributes(text: bytes, element: _Element, attributes: dict[str, str]) -> _Edit:
    """Set some attributes of an element."""
    tag = text[element.start : element.inner].decode()
    for name, value in attributes.items():
        tag = re.sub(rf"\s{name}\s*=\s*(?:'[^']*'|\"[^\"]*\")", "", tag)
        tag = re.sub(r"(\s*/?>)\Z", rf" {name}='{_escape(value)}'\1", tag)
    return element.start, element.inner, tag.encode()


def without_interfaces(xml: str) -> str:
    """
    The domain without its network interfaces.

    :raises DomainXmlError: this is no domain.
    """
    text = xml.encode()
    return _edited(text, [_cut(text, one) for one in _elements(text) if one.path == _INTERFACE])


#: A replacement: first byte, the byte after the last, and the new text.
_Edit = tuple[int, int, bytes]


def _cut(text: bytes, element: _Element) -> _Edit:
    """Cut an element out, with the white space in front of it."""
    return len(text[: element.start].rstrip(b" \t\r\n")), element.end, b""


def _edited(text: bytes, edits: list[_Edit]) -> str:
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text.decode()


def _elements(text: bytes) -> list[_Element]:
    """
    All elements in document order; the first is the domain.

    :raises DomainXmlError: this is no domain. A document type is refused: it can define entities, which can expand to
        other files or to gigabytes.
    """
    found: list[_Element] = []
    stack: list[_Element] = []
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
        element = _Element(path, attributes, at, tag.end())
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


def _encoded(xml: str) -> bytes:
    """:raises DomainXmlError: this was not UTF-8."""
    try:
        return xml.encode()
    except UnicodeEncodeError as err:
        raise DomainXmlError("the domain XML is not UTF-8") from err


def _escape(value: str) -> str:
    """:raises DomainXmlError: XML does not allow it."""
    if _IMPOSSIBLE.search(value):
        raise DomainXmlError(f"{value!a} cannot be written in XML")
    return value.translate(_ESCAPED)


def _unescape(raw: bytes) -> str:
    def character(reference: re.Match[str]) -> str:
        hexadecimal, decimal, name = reference.groups()
        if name:
            return _ENTITIES.get(name, reference[0])
        return chr(int(hexadecimal, 16) if hexadecimal else int(decimal))

    return _REFERENCE.sub(character, raw.decode()).strip()
