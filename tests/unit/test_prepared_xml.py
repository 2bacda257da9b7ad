"""Definitions of domains, changed so that their guests can hop: what is changed, and that nothing else is."""

from __future__ import annotations

import pytest
from sevhop.guest import reboot
from sevhop.libvirt import prepared_xml
from sevhop.libvirt.prepared_xml import Encryption, Wanted
from sevhop.libvirt.xml_elements import DomainXmlError

QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
#: As libvirt writes one.
PLAIN = """<domain type='kvm'>
  <name>old &amp; good</name>
  <metadata>
    <x:note xmlns:x='http://example.org/note'><memoryBacking/><launchSecurity type='sev'/></x:note>
  </metadata>
  <memory unit='KiB'>4194304</memory>
  <currentMemory unit='KiB'>4194304</currentMemory>
  <vcpu placement='static'>4</vcpu>
  <!-- <memoryBacking/> -->
  <os>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
  </os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <graphics type='vnc' port='-1' autoport='yes' passwd='secret'/>
  </devices>
</domain>
"""
BACKING = """  <memoryBacking>
    <source type='memfd'/>
    <access mode='shared'/>
  </memoryBacking>
"""
SHARED = PLAIN.replace("  <vcpu ", f"{BACKING}  <vcpu ")
SEV = (
    "  <launchSecurity type='sev'>\n    <cbitpos>51</cbitpos>\n    <policy>{}</policy>\n  </launchSecurity>\n</domain>"
)
#: What the definition of an SEV guest gets.
TUNE = "  <memtune>\n    <hard_limit unit='KiB'>5242880</hard_limit>\n  </memtune>\n"
ALL = Wanted("pc-q35-7.2", reboot.SHARED_FIRMWARE)


def backing(content: str) -> str:
    """A domain with this in its <memoryBacking>."""
    return PLAIN.replace("  <vcpu ", f"  <memoryBacking>{content}</memoryBacking>\n  <vcpu ")


def test_private_memory_becomes_a_shared_memfd() -> None:
    done = prepared_xml.prepare(PLAIN, Wanted())
    assert done.xml == SHARED
    assert done.changes == ("memory in a shared memfd",)


def test_prepared_definition_stays_as_it_is() -> None:
    for xml in (SHARED, SHARED.replace("\n", "\r\n"), SHARED.replace("\n", "").replace("  ", "")):
        assert prepared_xml.prepare(xml, Wanted("pc-q35-7.2")) == prepared_xml.Prepared(xml, ())


BACKINGS = {
    "<source type='file'/><access mode='shared'/>": "<source type='memfd'/><access mode='shared'/>",
    "<source type='anonymous'/>": "<source type='memfd'/><access mode='shared'/>",
    "<access mode='private'/>": "<access mode='shared'/><source type='memfd'/>",
    '<access mode = "private" />': "<access mode='shared' /><source type='memfd'/>",
    "<source type='memfd'/>": "<source type='memfd'/><access mode='shared'/>",
    "<hugepages><page size='2' unit='MiB'/></hugepages>": (
        "<hugepages><page size='2' unit='MiB'/></hugepages><source type='memfd'/><access mode='shared'/>"
    ),
    "<hugepages/><nosharepages/><allocation mode='immediate'/><discard/>": (
        "<hugepages/><nosharepages/><allocation mode='immediate'/><discard/>"
        "<source type='memfd'/><access mode='shared'/>"
    ),
    "<locked/>\n  ": "<locked/><source type='memfd'/><access mode='shared'/>\n  ",
    "\n    <locked/>\n  ": "\n    <locked/>\n    <source type='memfd'/>\n    <access mode='shared'/>\n  ",
    "\n    <source type='file'/>\n  ": "\n    <source type='memfd'/>\n    <access mode='shared'/>\n  ",
    "": "\n    <source type='memfd'/>\n    <access mode='shared'/>\n  ",
    "<!-- nothing --> ": "<!-- nothing -->\n    <source type='memfd'/>\n    <access mode='shared'/>\n  ",
}


@pytest.mark.parametrize("content", BACKINGS)
def test_memory_backing_of_another_sort_is_changed(content: str) -> None:
    done = prepared_xml.prepare(backing(content), Wanted())
    assert done.xml == backing(BACKINGS[content])
    assert prepared_xml.prepare(done.xml, Wanted()).changes == ()


def test_empty_memory_backing_gets_its_elements() -> None:
    xml = PLAIN.replace("  <vcpu ", "  <memoryBacking/>\n  <vcpu ")
    assert prepared_xml.prepare(xml, Wanted()).xml == SHARED


def test_definition_in_one_line_stays_in_one_line() -> None:
    xml = "<domain><memory>1</memory><os/></domain>"
    expected = f"<domain><memory>1</memory>{prepared_xml.MEMORY_BACKING}<os/></domain>"
    assert prepared_xml.prepare(xml, Wanted()).xml == expected


def test_numa_cells_and_memory_modules_are_shared() -> None:
    cells = (
        "<cell id='0' cpus='0-1' memory='2' unit='GiB' memAccess='{0}'/><cell id='1' cpus='2-3' memory='2' unit='GiB'/>"
    )
    modules = "<memory model='dimm' access='{0}'><target><size>1</size></target></memory>"
    xml = SHARED.replace("  <devices>", f"  <cpu><numa>{cells}</numa></cpu>\n  <devices>{modules}")
    # libvirt's attributes are in any order.
    done = prepared_xml.prepare(xml.replace("{0}", "private"), Wanted())
    assert done.xml == xml.replace("{0}", "shared")
    assert done.changes == ("memory in a shared memfd",)


def test_alias_becomes_the_machine_type_that_it_means() -> None:
    xml = SHARED.replace("machine='pc-q35-7.2'", "machine='q35'")
    done = prepared_xml.prepare(xml, Wanted("pc-q35-7.2"))
    assert done.xml == SHARED
    assert done.changes == ("machine type pc-q35-7.2 instead of q35",)
    assert prepared_xml.prepare(xml, Wanted()).xml == xml


def sev(policy: str, xml: str = SHARED) -> str:
    return xml.replace("</domain>", SEV.format(policy))


def test_sev_guest_gets_a_limit_and_shared_firmware() -> None:
    done = prepared_xml.prepare(sev("0x0001", PLAIN), ALL)
    expected = PLAIN.replace("  <vcpu ", f"{BACKING}{TUNE}  <vcpu ")
    arguments = "".join(f"    <qemu:arg value='{one}'/>\n" for one in reboot.SHARED_FIRMWARE)
    line = f"  <qemu:commandline xmlns:qemu='{QEMU}'>\n{arguments}  </qemu:commandline>\n</domain>"
    assert done.xml == sev("0x0001", expected).replace("</domain>", line)
    assert len(done.changes) == 3
    assert prepared_xml.prepare(done.xml, ALL) == prepared_xml.Prepared(done.xml, ())


LIMITS = {
    "<memtune><hard_limit unit='GiB'>4</hard_limit></memtune>": None,
    "<memtune><hard_limit unit='GB'>5</hard_limit></memtune>": None,
    "<memtune><hard_limit>4194304</hard_limit></memtune>": None,
    "<memtune><hard_limit unit='G'>3</hard_limit></memtune>": (
        "<memtune><hard_limit unit='KiB'>5242880</hard_limit></memtune>"
    ),
    "<memtune><hard_limit unit='bytes'>4194304</hard_limit></memtune>": (
        "<memtune><hard_limit unit='KiB'>5242880</hard_limit></memtune>"
    ),
    "<memtune><soft_limit>1</soft_limit></memtune>": (
        "<memtune><soft_limit>1</soft_limit><hard_limit unit='KiB'>5242880</hard_limit></memtune>"
    ),
    "<memtune/>": "<memtune>\n    <hard_limit unit='KiB'>5242880</hard_limit>\n  </memtune>",
}


@pytest.mark.parametrize("tune", LIMITS)
def test_limit_of_an_sev_guest_is_at_least_its_memory(tune: str) -> None:
    xml = sev("1").replace("  <memoryBacking>", f"  {tune}\n  <memoryBacking>")
    done = prepared_xml.prepare(xml, Wanted())
    assert done.xml == xml.replace(tune, LIMITS[tune] or tune)


def test_limit_of_an_sev_guest_has_room_for_memory_that_is_plugged() -> None:
    xml = sev("1").replace("  <memory ", "  <maxMemory slots='2' unit='GiB'>8</maxMemory>\n  <memory ")
    assert "<hard_limit unit='KiB'>9437184</hard_limit>" in prepared_xml.prepare(xml, Wanted()).xml


def test_locked_memory_needs_no_limit() -> None:
    xml = sev("1").replace("    <source ", "    <locked/>\n    <source ")
    assert prepared_xml.prepare(xml, Wanted()).xml == xml


def test_limit_is_for_sev_guests_only() -> None:
    xml = SHARED.replace("</domain>", "  <launchSecurity type='sev-snp'/>\n</domain>")
    assert prepared_xml.prepare(xml, Wanted()).xml == xml


@pytest.mark.parametrize("prefix", ["qemu:", "q:", ""])
def test_arguments_join_those_of_the_owner(prefix: str) -> None:
    declared = f"xmlns:{prefix[:-1]}" if prefix else "xmlns"
    own = f"<{prefix}commandline {declared}='{QEMU}'>\n    <{prefix}arg value='-s'/>\n  </{prefix}commandline>\n"
    xml = SHARED.replace("</domain>", f"  {own}</domain>")
    done = prepared_xml.prepare(xml, ALL)
    added = "".join(f"\n    <{prefix}arg value='{one}'/>" for one in reboot.SHARED_FIRMWARE)
    assert done.xml == xml.replace(f"<{prefix}arg value='-s'/>", f"<{prefix}arg value='-s'/>{added}")
    assert prepared_xml.prepare(done.xml, ALL).changes == ()


@pytest.mark.parametrize("argument", ["aux-ram-share=on", "aux-ram-share=off", "q35,aux-ram-share=off"])
def test_arguments_of_the_owner_are_not_changed(argument: str) -> None:
    line = f"<q:commandline xmlns:q='{QEMU}'><q:arg value='-machine'/><q:arg value='{argument}'/></q:commandline>"
    xml = SHARED.replace("</domain>", f"{line}</domain>")
    assert prepared_xml.prepare(xml, ALL) == prepared_xml.Prepared(xml, ())


@pytest.mark.parametrize(
    ("security", "expected"),
    [
        ("", Encryption()),
        ("<launchSecurity type='sev'><policy>0x0005</policy></launchSecurity>", Encryption("sev", 5)),
        ("<launchSecurity type='sev'><policy>3</policy></launchSecurity>", Encryption("sev", 3)),
        ("<launchSecurity type='s390-pv'/>", Encryption("s390-pv")),
    ],
)
def test_encryption_is_that_of_the_domain(security: str, expected: Encryption) -> None:
    assert prepared_xml.encryption(PLAIN.replace("</domain>", f"{security}</domain>")) == expected


@pytest.mark.parametrize(
    "xml",
    [
        "<network/>",
        "<domain>",
        sev("many"),
        sev("1").replace("<memory unit='KiB'>4194304", "<memory unit='KiB'>much"),
        sev("1").replace("<memory unit='KiB'>", "<memory unit='shelves'>"),
    ],
)
def test_definition_that_makes_no_sense_is_an_error(xml: str) -> None:
    with pytest.raises(DomainXmlError):
        prepared_xml.encryption(xml)
        prepared_xml.prepare(xml, Wanted())
