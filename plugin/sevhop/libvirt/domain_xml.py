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

from collections.abc import Sequence
from dataclasses import dataclass

from .xml_elements import NAMESPACE as NAMESPACE
from .xml_elements import DomainXmlError as DomainXmlError
from .xml_elements import Edit, Element, cut, edited, encoded, escape, parse, unescape, with_attributes

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
_SECLABEL = ("domain", "seclabel")
#: The element that the label of SELinux is in place of; empty if there was none.
_LABELLED = "SEVHOP_SECLABEL"


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
    text = encoded(xml)
    elements = parse(text)

    def content(*path: str) -> str:
        found = next((one for one in elements if one.path == ("domain", *path)), None)
        return unescape(text[found.inner : found.inner_end]) if found else ""

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
    text = encoded(xml)
    for element in parse(text):
        if element.path == ("domain", "devices", "emulator"):
            return (text[: element.inner] + escape(emulator).encode() + text[element.inner_end :]).decode()
    raise DomainXmlError("the domain has no <emulator>")


def ports(xml: str) -> list[dict[str, str]]:
    """
    The ports of each display of a running domain. They are not in the XML of a save image.

    :raises DomainXmlError: this is no domain.
    """
    graphics = [one for one in parse(encoded(xml)) if one.path == _GRAPHICS]
    return [
        {name: value for name in _PORTS if (value := one.attributes.get(name, "")).isdigit() and int(value)}
        for one in graphics
    ]


def for_destination(
    xml: str,
    emulator: str,
    environment: dict[str, str],
    monitor: str,
    displays: Sequence[dict[str, str]] = (),
    label: str = "",
) -> str:
    """
    The domain of a destination. A display whose port libvirt has chosen keeps it: a client that connects to it again
    must find the same guest. Files that devices write to are appended to: libvirt empties them when it starts a domain.

    :param environment: of QEMU, in addition to the domain's own.
    :param monitor: path of the socket of the monitor for the keeper.
    :param displays: the source's :func:`ports`.
    :param label: of SELinux, that the source has. libvirt would choose another one, with which the destination could
        use neither the guest's memory nor its disks as long as the source does.
    :raises DomainXmlError: this is no domain, or one without an emulator.
    """
    text = with_emulator(without_additions(xml), emulator).encode()
    environment = {**environment, MONITOR: monitor}
    edits: list[Edit] = []
    for element in parse(text):
        # A variable can be set once; libraries that the domain preloads stay preloaded.
        if element.path == _ENV and element.attributes.get("name") == "LD_PRELOAD" and "LD_PRELOAD" in environment:
            environment["LD_PRELOAD"] += f":{element.attributes.get('value', '')}"
            edits.append(cut(text, element))
    graphics = [element for element in parse(text) if element.path == _GRAPHICS]
    kept = []
    for number, (element, has) in enumerate(zip(graphics, displays, strict=False)):
        if element.attributes.get("autoport") == "yes" and has:
            kept.append(str(number))
            edits.append(with_attributes(text, element, {**has, "autoport": "no"}))
    if kept:
        environment[_AUTOPORT] = ",".join(kept)
    edits += [with_attributes(text, element, {"append": "on"}) for element in _logs(parse(text))]
    edits += _with_label(text, label, environment) if label else []
    added = "".join(f"<q:env name='{escape(name)}' value='{escape(v)}'/>" for name, v in environment.items())
    end = parse(text)[0].inner_end
    edits.append((end, end, f"<q:commandline xmlns:q='{NAMESPACE}'>{added}</q:commandline>\n".encode()))
    return edited(text, edits)


def _with_label(text: bytes, label: str, environment: dict[str, str]) -> list[Edit]:
    """The administrator's own choice of a label stays: then the destination has the source's all the same, or none."""
    elements = parse(text)
    chosen = [one for one in elements if one.path == _SECLABEL and one.attributes.get("model", "selinux") == "selinux"]
    if any(one.attributes.get("type", "dynamic") != "dynamic" for one in chosen):
        return []
    start, end = (chosen[0].start, chosen[0].end) if chosen else 2 * (elements[0].inner_end,)
    environment[_LABELLED] = text[start:end].decode()
    fixed = f"<seclabel type='static' model='selinux' relabel='yes'><label>{escape(label)}</label></seclabel>"
    return [(start, end, fixed.encode())]


def _without_label(text: bytes) -> list[Edit]:
    elements = parse(text)
    kept = [one for one in elements if _is_mark(one) and one.attributes["name"] == _LABELLED]
    fixed = [one for one in elements if one.path == _SECLABEL and one.attributes.get("model") == "selinux"]
    if not kept or not fixed:
        return []
    before = kept[0].attributes.get("value", "")
    return [(fixed[0].start, fixed[0].end, before.encode()) if before else cut(text, fixed[0])]


def _logs(elements: Sequence[Element]) -> list[Element]:
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
    text = encoded(with_chosen_ports(xml))
    edits = _without_label(text)
    for commandline in (one for one in parse(text) if one.path == _COMMANDLINE):
        ours: list[Element] = []
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
                    shorter = f"{prefix} name='LD_PRELOAD' value='{escape(':'.join(others))}'/>"
                    edits.append((child.start, child.end, shorter.encode()))
        whole = len(ours) == len(commandline.children) > 0
        edits += [cut(text, element) for element in ([commandline] if whole else ours)]
    return edited(text, edits)


def marks(xml: str) -> dict[str, str]:
    """
    What a hop has left in a domain: the environment variables, without LD_PRELOAD.

    :raises DomainXmlError: this is no domain.
    """
    found = (one.attributes for one in parse(encoded(xml)) if _is_mark(one))
    return {attributes["name"]: attributes.get("value", "") for attributes in found}


def with_mark_renamed(xml: str, mark: str, new: str) -> str:
    """
    The domain in which one of those variables has another name.

    :param mark, new: made of letters that XML has no other form for.
    :raises DomainXmlError: this is no domain.
    """
    text = encoded(xml)
    named = [one for one in parse(text) if _is_mark(one) and one.attributes["name"] == mark]
    edits = []
    for element in named:
        tag = text[element.start : element.inner]
        edits.append((element.start, element.inner, tag.replace(mark.encode(), new.encode(), 1)))
    return edited(text, edits)


def _is_mark(element: Element) -> bool:
    return element.path == _ENV and element.attributes.get("name", "").startswith(_MARK)


def with_chosen_ports(xml: str) -> str:
    """
    The domain of a destination, in which libvirt chooses those ports again that it chose before the hop.

    :raises DomainXmlError: this is no domain.
    """
    text = encoded(xml)
    elements = parse(text)
    kept = [one for one in elements if _is_mark(one) and one.attributes["name"] == _AUTOPORT]
    chosen = {number for mark in kept for number in mark.attributes.get("value", "").split(",")}
    graphics = [one for one in elements if one.path == _GRAPHICS]
    ours = [one for number, one in enumerate(graphics) if str(number) in chosen]
    return edited(text, [with_attributes(text, one, {"autoport": "yes"}) for one in ours])


def without_interfaces(xml: str) -> str:
    """
    The domain without its network interfaces.

    :raises DomainXmlError: this is no domain.
    """
    text = xml.encode()
    return edited(text, [cut(text, one) for one in parse(text) if one.path == _INTERFACE])
