"""
The definition of a domain, changed so that its guest can hop when it is started the next time.

This is what :mod:`sevhop.checks` demands of a running guest, as far as it is decided by the definition: memory that can
be shared, a machine type that is the same one in every QEMU, and for SEV a limit for the memory that is locked. Nothing
else is changed, and what is there already is not changed again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .xml_elements import NAMESPACE, DomainXmlError, Edit, Element, edited, encoded, escape, parse, unescape
from .xml_elements import with_attributes as _with

_SOURCE, _ACCESS = "<source type='memfd'/>", "<access mode='shared'/>"
#: What shares the memory of a domain.
MEMORY_BACKING = f"<memoryBacking>{_SOURCE}{_ACCESS}</memoryBacking>"
#: KiB that QEMU may lock in addition to the guest's memory, for firmware, video memory and its own: what libvirt
#: itself adds for devices of the host.
_OVERHEAD = 1 << 20
#: In the order in which libvirt writes them: a new element comes after the last of these.
_BEFORE_MEMTUNE = ("name", "uuid", "genid", "title", "description", "metadata", "maxMemory", "memory", "currentMemory")
_BEFORE_BACKING = (*_BEFORE_MEMTUNE, "blkiotune", "memtune")
#: Units of memory: bytes for one. libvirt's default is KiB.
_UNITS: dict[str, int] = {"b": 1, "bytes": 1} | {
    name: base**power
    for power, letter in enumerate("KMGTPE", 1)
    for name, base in ((letter.lower(), 1024), (f"{letter}iB".lower(), 1024), (f"{letter}B".lower(), 1000))
}


@dataclass(frozen=True)
class Wanted:
    """
    What does not follow from the definition alone.

    :ivar machine: the machine type that its alias means; empty if it has none.
    :ivar shared_firmware: QEMU's arguments that share the firmware of an SEV guest; empty if it does not need them.
    """

    machine: str = ""
    shared_firmware: Sequence[str] = ()


@dataclass(frozen=True)
class Prepared:
    """
    A definition that was prepared.

    :ivar changes: what was changed, each in a few words; none if it had everything.
    """

    xml: str
    changes: tuple[str, ...]


@dataclass(frozen=True)
class Encryption:
    """
    The ``<launchSecurity>`` of a domain.

    :ivar kind: its type, such as ``sev``; empty without one.
    :ivar policy: of the guest.
    """

    kind: str = ""
    policy: int = 0


def encryption(xml: str) -> Encryption:
    """
    Whether a domain has encrypted memory.

    :raises DomainXmlError: this is no domain.
    """
    text = encoded(xml)
    found = _find(parse(text), "launchSecurity")
    if found is None:
        return Encryption()
    policy = _child(found, "policy")
    try:
        value = int(_content(text, policy), 0) if policy is not None else 0
    except ValueError as err:
        raise DomainXmlError(f"the policy {_content(text, policy)} is no number") from err
    return Encryption(found.attributes.get("type", ""), value)


def prepare(xml: str, wanted: Wanted) -> Prepared:
    """
    Prepare a definition.

    :raises DomainXmlError: this is no domain.
    """
    text = encoded(xml)
    elements = parse(text)
    edits: list[Edit] = []
    changes: list[str] = []
    for made, change in (
        _memory(text, elements),
        _machine(text, elements, wanted.machine),
        _limit(text, elements),
        _firmware(text, elements, wanted.shared_firmware),
    ):
        edits += made
        changes += [change] if made else []
    return Prepared(edited(text, edits), tuple(changes))


def _memory(text: bytes, elements: Sequence[Element]) -> tuple[list[Edit], str]:
    """All memory in memfds that are mapped shared: of the domain, of its NUMA cells and of its memory modules."""
    edits = []
    backing = _find(elements, "memoryBacking")
    if backing is None:
        edits.append(_new(text, elements, _BEFORE_BACKING, "memoryBacking", [_SOURCE, _ACCESS]))
    else:
        missing = []
        for name, attribute, value, new in (
            ("source", "type", "memfd", _SOURCE),
            ("access", "mode", "shared", _ACCESS),
        ):
            child = _child(backing, name)
            if child is None:
                missing.append(new)
            elif child.attributes.get(attribute) != value:
                edits.append(_with(text, child, {attribute: value}))
        edits += [_inserted(text, backing, missing)] if missing else []
    for path, attribute in (("cpu/numa/cell", "memAccess"), ("devices/memory", "access")):
        for one in _all(elements, path):
            if one.attributes.get(attribute, "shared") != "shared":
                edits.append(_with(text, one, {attribute: "shared"}))
    return edits, "memory in a shared memfd"


def _machine(text: bytes, elements: Sequence[Element], machine: str) -> tuple[list[Edit], str]:
    kind = _find(elements, "os/type")
    if kind is None or not machine or kind.attributes.get("machine", "") in ("", machine):
        return [], ""
    return [_with(text, kind, {"machine": machine})], f"machine type {machine} instead of {kind.attributes['machine']}"


def _limit(text: bytes, elements: Sequence[Element]) -> tuple[list[Edit], str]:
    """All memory of an SEV guest is locked, and a process may lock little unless its domain has a limit."""
    security, locked = _find(elements, "launchSecurity"), _find(elements, "memoryBacking/locked")
    if security is None or security.attributes.get("type") != "sev" or locked is not None:
        return [], ""
    memory = max((_kibibytes(text, one) for name in ("memory", "maxMemory") for one in _all(elements, name)), default=0)
    tune, limit = _find(elements, "memtune"), _find(elements, "memtune/hard_limit")
    if limit is not None and _kibibytes(text, limit) >= memory:
        return [], ""
    new = f"<hard_limit unit='KiB'>{memory + _OVERHEAD}</hard_limit>"
    if limit is not None:
        edit = limit.start, limit.end, new.encode()
    elif tune is not None:
        edit = _inserted(text, tune, [new])
    else:
        edit = _new(text, elements, _BEFORE_MEMTUNE, "memtune", [new])
    return [edit], f"hard_limit {memory + _OVERHEAD} KiB, since all memory of an SEV guest is locked"


def _firmware(text: bytes, elements: Sequence[Element], arguments: Sequence[str]) -> tuple[list[Edit], str]:
    """An argument about the same property is its owner's decision, whatever its value."""
    option = arguments[-1].partition("=")[0] if arguments else ""
    own = [one.attributes.get("value", "") for one in _all(elements, "qemu:commandline/qemu:arg")]
    if not arguments or any(option in argument for argument in own):
        return [], ""
    line = _find(elements, "qemu:commandline")
    if line is not None:
        prefix = _name(text, line).rpartition(":")[0]
        new = [f"<{prefix}{':' if prefix else ''}arg value='{escape(one)}'/>" for one in arguments]
        edit = _inserted(text, line, new)
    else:
        new = [f"<qemu:arg value='{escape(one)}'/>" for one in arguments]
        start = f"qemu:commandline xmlns:qemu='{NAMESPACE}'"
        edit = _inserted(text, elements[0], _block(start, "qemu:commandline", new, _step(text, elements[0])))
    return [edit], f"{arguments[-1]}, so that the guest can reboot after a hop"


# -- elements and text -----------------------------------------------------------------------------


def _all(elements: Sequence[Element], path: str) -> Iterator[Element]:
    wanted = ("domain", *path.split("/"))
    return (one for one in elements if one.path == wanted)


def _find(elements: Sequence[Element], path: str) -> Element | None:
    return next(_all(elements, path), None)


def _child(element: Element, name: str) -> Element | None:
    return next((child for child in element.children if child.path[-1] == name), None)


def _content(text: bytes, element: Element | None) -> str:
    return unescape(text[element.inner : element.inner_end]) if element is not None else ""


def _kibibytes(text: bytes, element: Element) -> int:
    """An amount of memory, rounded up as libvirt does."""
    unit = _UNITS.get(element.attributes.get("unit", "KiB").lower())
    content = _content(text, element)
    if unit is None or not (content.isascii() and content.isdecimal()):
        raise DomainXmlError(f"{element.path[-1]} has no size: {content!a}")
    return (int(content) * unit + 1023) // 1024


def _name(text: bytes, element: Element) -> str:
    """Its name as it is written, with its prefix."""
    found = re.match(rb"<([^\s/>]+)", text[element.start :])
    assert found is not None
    return found[1].decode()


def _indentation(text: bytes, at: int) -> str | None:
    """The white space between the beginning of a line and what begins there; None if something else is in between."""
    before = text[:at]
    white = before[len(before.rstrip(b" \t")) :]
    return white.decode() if before[: len(before) - len(white)].endswith(b"\n") else None


def _step(text: bytes, domain: Element) -> str:
    """By what an element is indented more than the one that it is in."""
    return (domain.children and _indentation(text, domain.children[0].start)) or ""


def _block(start: str, name: str, children: Sequence[str], step: str) -> list[str]:
    """The lines of an element. :param start: its name and attributes."""
    return [f"<{start}>", *(f"{step}{child}" for child in children), f"</{name}>"]


def _inserted(text: bytes, parent: Element, lines: Sequence[str]) -> Edit:
    """Lines as the last ones in an element, indented as its last child is; or as this text is elsewhere."""
    own = _indentation(text, parent.start)
    step = _step(text, parse(text)[0])
    if parent.children:
        inner = _indentation(text, parent.children[-1].start)
    else:
        inner = own + step if own is not None else None
    separator = "" if inner is None else f"\n{inner}"
    new = "".join(f"{separator}{line if inner is not None else line.strip()}" for line in lines)
    if parent.inner_end == parent.end:  # <name/>
        tag = text[parent.start : parent.end].decode().removesuffix("/>").rstrip()
        closing = "" if inner is None else f"\n{own}"
        return parent.start, parent.end, f"{tag}>{new}{closing}</{_name(text, parent)}>".encode()
    if parent.children:
        at = parent.children[-1].end
        return at, at, new.encode()
    closing = "" if inner is None else f"\n{own}"
    at = parent.inner + len(text[parent.inner : parent.inner_end].rstrip())  # after a comment
    return at, parent.inner_end, f"{new}{closing}".encode()


def _new(text: bytes, elements: Sequence[Element], after: Sequence[str], name: str, children: Sequence[str]) -> Edit:
    """A new element of the domain, after the last of those that libvirt writes before it."""
    present = [child for child in elements[0].children if child.path[-1] in after]
    at = max((child.end for child in present), default=elements[0].inner)
    inner = _indentation(text, present[-1].start) if present else None
    lines = _block(name, name, children, _step(text, elements[0]) if inner is not None else "")
    separator = "" if inner is None else f"\n{inner}"
    return at, at, "".join(f"{separator}{line}" for line in lines).encode()
