"""Domain XML: whatever it contains, it is changed only where a hop needs it, or refused."""

from __future__ import annotations

import contextlib
from xml.etree import ElementTree

import pytest
from hypothesis import strategies as st
from sevhop.libvirt import domain_xml
from sevhop.libvirt.domain_xml import DomainXmlError

from .described_domains import OLD, domains
from .inputs import fuzzed, texts

QEMU = f"{{{domain_xml.NAMESPACE}}}"
ENVIRONMENT = {"LD_PRELOAD": "/lib/adopt.so", "SEVHOP_KEEPER": "/run/sevhop/a/keeper"}
NEW = "/opt/qemu"


def passed_through(xml: str) -> list[tuple[str, dict[str, str]]]:
    """Tag and attributes of all that is passed through to QEMU, in order."""
    root = ElementTree.fromstring(xml.encode())
    return [(child.tag, child.attrib) for line in root.findall(f"{QEMU}commandline") for child in line]


def without_ours(xml: str) -> list[tuple[str, dict[str, str]]]:
    """The same without the additions of a hop, or what looks like them."""
    kept: list[tuple[str, dict[str, str]]] = []
    for line in ElementTree.fromstring(xml.encode()).findall(f"{QEMU}commandline"):
        own: list[tuple[str, dict[str, str]]] = []
        for child in line:
            value, name = child.attrib["value"], child.attrib.get("name", "")
            if name == "LD_PRELOAD":
                libraries = [path for path in value.split(":") if not path.endswith("/adopt.so")]
                own += [(child.tag, {"name": name, "value": ":".join(libraries)})] if libraries else []
            elif not name.startswith("SEVHOP_"):
                own.append((child.tag, child.attrib))
        kept += own
    return kept


@fuzzed(xml=domains())
def test_without_additions_keeps_all_else(xml: str) -> None:
    back = domain_xml.without_additions(xml)
    assert passed_through(back) == without_ours(xml)
    before, after = ElementTree.fromstring(xml.encode()), ElementTree.fromstring(back.encode())
    assert after.findtext("name") == before.findtext("name")


@fuzzed(xml=domains())
def test_additions_are_removed(xml: str) -> None:
    plain = domain_xml.without_additions(xml)
    assert domain_xml.without_additions(plain) == plain
    added = domain_xml.for_destination(xml, NEW, ENVIRONMENT, "/run/sevhop/a/monitor/qmp")
    assert domain_xml.describe(added).emulator == NEW
    again = domain_xml.for_destination(added, NEW, ENVIRONMENT, "/run/sevhop/a/monitor/qmp")
    assert passed_through(again) == passed_through(added)
    preloads = [child[1]["value"] for child in passed_through(added) if child[1].get("name") == "LD_PRELOAD"]
    assert len(preloads) == 1
    assert preloads[0].split(":").count("/lib/adopt.so") == 1
    back = domain_xml.without_additions(added)
    own = [child for child in passed_through(plain) if child[1].get("name") != "LD_PRELOAD"]
    assert [child for child in passed_through(back) if child[1].get("name") != "LD_PRELOAD"] == own


@fuzzed(xml=domains())
def test_describe_agrees_with_a_real_parser(xml: str) -> None:
    found, root = domain_xml.describe(xml), ElementTree.fromstring(xml.encode())
    assert found.name == (root.findtext("name") or "").strip()
    kind = root.find("os/type")
    assert kind is not None
    assert found.machine == kind.get("machine")
    assert found.emulator == OLD


@fuzzed(emulator=texts, monitor=texts, value=texts)
def test_additions_write_values_unchanged_or_refuse_them(emulator: str, monitor: str, value: str) -> None:
    xml = f"<domain type='kvm'><devices><emulator>{OLD}</emulator></devices></domain>"
    try:
        added = domain_xml.for_destination(xml, emulator, {"SEVHOP_X": value}, monitor)
    except DomainXmlError:
        return
    root = ElementTree.fromstring(added.encode())
    assert root.findtext("devices/emulator", "") == emulator
    entries = passed_through(added)
    assert [tag for tag, _ in entries] == [f"{QEMU}env"] * 2
    assert [entry["value"] for _, entry in entries] == [value, monitor]
    assert domain_xml.marks(added) == {"SEVHOP_X": value, "SEVHOP_MONITOR": monitor}
    assert domain_xml.describe(added).emulator == emulator.strip()


pieces = st.one_of(
    texts,
    st.sampled_from(
        (
            *("<domain>", "</domain>", "<domain type='", "<name>", "</name>", "<emulator>", "<devices>", "</devices>"),
            *("<!DOCTYPE d [<!ENTITY a 'b'>]>", "&a;", "<![CDATA[", "<?xml encoding='utf-16'?>", "<a b='>'/>"),
            *("<q:env ", "xmlns:q='", domain_xml.NAMESPACE),
        )
    ),
)


@fuzzed(
    xml=st.one_of(
        st.lists(pieces, max_size=12).map("".join),
        domains().flatmap(
            lambda text: st.tuples(st.integers(0, len(text)), pieces, st.integers(0, 9)).map(
                lambda cut: text[: cut[0]] + cut[1] + text[cut[0] + cut[2] :]
            )
        ),
    )
)
def test_garbage_is_refused_in_one_way(xml: str) -> None:
    for function in (
        domain_xml.describe,
        domain_xml.marks,
        domain_xml.without_additions,
        lambda text: domain_xml.with_emulator(text, NEW),
        lambda text: domain_xml.for_destination(text, NEW, ENVIRONMENT, "/m"),
    ):
        with contextlib.suppress(DomainXmlError):
            function(xml)


def test_entities_are_not_expanded() -> None:
    xml = "<!DOCTYPE d [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;&a;'>]><domain><name>&b;</name></domain>"
    with pytest.raises(DomainXmlError, match="document type"):
        domain_xml.without_additions(xml)


def test_deep_nesting_is_refused() -> None:
    """A hundred thousand levels would take gigabytes."""
    with pytest.raises(DomainXmlError, match="deep"):
        domain_xml.describe("<domain>" + "<a>" * 100_000 + "</a>" * 100_000 + "</domain>")


def test_namespace_may_have_blanks() -> None:
    """They are the administrator's, in <metadata>."""
    xml = f"<domain><metadata><n:a xmlns:n='a b'/></metadata><devices><emulator>{OLD}</emulator></devices></domain>"
    assert domain_xml.with_emulator(xml, NEW) == xml.replace(OLD, NEW)


@pytest.mark.parametrize("emulator", ["/opt/\x01qemu", "/opt/\udcffqemu", "/opt/\uffffqemu", "/opt/\0"])
def test_path_that_xml_does_not_allow_is_refused(emulator: str) -> None:
    with pytest.raises(DomainXmlError, match="XML"):
        domain_xml.with_emulator(f"<domain><devices><emulator>{OLD}</emulator></devices></domain>", emulator)


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(DomainXmlError, match="UTF-8"):
        domain_xml.describe("<domain><name>\udcff</name></domain>")
