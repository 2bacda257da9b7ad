"""Domain XML: what is added for a destination and removed again, and that all else stays as it was."""

from __future__ import annotations

import pytest
from sevhop.libvirt import domain_xml
from sevhop.libvirt.domain_xml import DomainXmlError

PLAIN = """<domain type='kvm' id='7'>
  <name>web &amp; mail</name>
  <uuid>11111111-2222-3333-4444-555555555501</uuid>
  <metadata><x:tag xmlns:x='http://example.org/'><emulator>not this</emulator></x:tag></metadata>
  <!-- a > comment -->
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
  </devices>
</domain>
"""
ENVIRONMENT = {"LD_PRELOAD": "/lib/adopt.so", "SEVHOP_KEEPER": "/run/sevhop/a/keeper"}
OWN = PLAIN.replace(
    "</domain>",
    "  <qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>\n"
    "    <qemu:arg value='-device'/>\n    <qemu:arg value='edu'/>\n"
    "    <qemu:env name='LD_PRELOAD' value='/lib/own.so'/>\n"
    "  </qemu:commandline>\n</domain>",
)


def for_destination(xml: str) -> str:
    return domain_xml.for_destination(xml, "/opt/qemu", ENVIRONMENT, "/run/sevhop/a/monitor/qmp")


def test_describe_reads_the_domain() -> None:
    found = domain_xml.describe(PLAIN)
    assert found.name == "web & mail"
    assert found.uuid.endswith("501")
    assert (found.kind, found.arch, found.machine) == ("kvm", "x86_64", "pc-q35-7.2")
    assert found.emulator == "/usr/bin/qemu-system-x86_64"


def test_with_emulator_changes_only_that() -> None:
    changed = domain_xml.with_emulator(PLAIN, "/opt/a&b")
    assert changed == PLAIN.replace("/usr/bin/qemu-system-x86_64", "/opt/a&amp;b")
    assert domain_xml.describe(changed).emulator == "/opt/a&b"


@pytest.mark.parametrize("xml", [PLAIN, OWN])
def test_additions_are_removed(xml: str) -> None:
    added = for_destination(xml)
    assert "/lib/adopt.so" in added
    assert domain_xml.describe(added).emulator == "/opt/qemu"
    back = domain_xml.with_emulator(domain_xml.without_additions(added), "/usr/bin/qemu-system-x86_64")
    assert "sevhop" not in back
    assert "adopt.so" not in back
    assert back.count("own.so") == xml.count("own.so")
    assert back.count("'edu'") == xml.count("'edu'")
    if xml == PLAIN:
        assert back.split() == PLAIN.split()


def test_additions_of_a_second_hop_replace_those_of_the_first() -> None:
    twice = for_destination(for_destination(OWN))
    assert twice.count("SEVHOP_MONITOR") == 1
    assert twice.count("adopt.so") == 1
    assert twice.count("/lib/own.so") == 1
    assert twice.count("LD_PRELOAD") == 1


def test_additions_are_removed_as_libvirt_writes_them() -> None:
    """libvirt puts everything into one element, with its own prefix and in its own order."""
    xml = OWN.replace(
        "<qemu:env name='LD_PRELOAD' value='/lib/own.so'/>",
        "<qemu:env name='LD_PRELOAD' value='/lib/adopt.so:/lib/own.so'/><qemu:env name='SEVHOP_KEEPER' value='/k'/>",
    )
    back = domain_xml.without_additions(xml)
    assert "".join(back.split()) == "".join(OWN.split())


@pytest.mark.parametrize(
    ("device", "appending"),
    [
        (
            "<serial type='file'><source path='/a' append='off'/></serial>",
            "<serial type='file'><source path='/a' append='on'/></serial>",
        ),
        (
            "<channel type='file'><source path='/a'><seclabel relabel='no'/></source></channel>",
            "<channel type='file'><source path='/a' append='on'><seclabel relabel='no'/></source></channel>",
        ),
        (
            "<console type='pty'><source path='/dev/pts/1'/><log file='/a'/></console>",
            "<console type='pty'><source path='/dev/pts/1'/><log file='/a' append='on'/></console>",
        ),
        (
            "<redirdev type='tcp' bus='usb'><source mode='connect' host='h' service='1'/><log file='/a'/></redirdev>",
            "<source mode='connect' host='h' service='1'/><log file='/a' append='on'/></redirdev>",
        ),
        (
            "<rng model='virtio'><backend model='egd' type='udp'><log file='/a'/></backend></rng>",
            "<rng model='virtio'><backend model='egd' type='udp'><log file='/a' append='on'/></backend></rng>",
        ),
        ("<disk type='file'><source file='/a'/></disk>", "<disk type='file'><source file='/a'/></disk>"),
    ],
)
def test_destination_appends_to_the_files_that_devices_write(device: str, appending: str) -> None:
    assert appending in for_destination(PLAIN.replace("</emulator>\n  </devices>", f"</emulator>{device}</devices>"))


MARKED = f"""<domain type='kvm'><name>SEVHOP_NAME</name><metadata><a name='SEVHOP_IMAGE'/></metadata>
<devices><emulator>/q</emulator></devices>
<x:commandline xmlns:x='{domain_xml.NAMESPACE}'><x:arg value='SEVHOP_ARGUMENT'/>
<x:env value='SEVHOP_IMAGE' name="SEVHOP_KEEPER"/><x:env name = 'SEVHOP_IMAGE'\tvalue='without RAM'/>
</x:commandline></domain>"""


def test_marks_are_what_qemu_gets() -> None:
    assert domain_xml.marks(PLAIN) == {}
    assert domain_xml.marks(MARKED) == {"SEVHOP_KEEPER": "SEVHOP_IMAGE", "SEVHOP_IMAGE": "without RAM"}
    renamed = domain_xml.with_mark_renamed(MARKED, "SEVHOP_IMAGE", "SEVHOP_RESTORED")
    assert renamed == MARKED.replace("<x:env name = 'SEVHOP_IMAGE'", "<x:env name = 'SEVHOP_RESTORED'")


def test_path_with_commas_and_quotes_is_escaped() -> None:
    added = domain_xml.for_destination(PLAIN, "/q", {"A": "it's <&>"}, "/run/a,b")
    assert "<q:env name='SEVHOP_MONITOR' value='/run/a,b'/>" in added
    domain_xml.describe(added)
    assert "it&apos;s &lt;&amp;&gt;" in added


@pytest.mark.parametrize(
    ("xml", "reason"),
    [
        ("", "not well-formed"),
        ("<domain>", "not well-formed"),
        ("<network><name>a</name></network>", "not that of a domain"),
        ("<domain/>", "not that of a domain"),
        ("<!DOCTYPE domain [<!ENTITY a 'b'>]><domain><name>&a;</name></domain>", "document type"),
        ("<!DOCTYPE d SYSTEM 'file:///etc/passwd'><domain><name>a</name></domain>", "document type"),
    ],
)
def test_describe_refuses_other_documents(xml: str, reason: str) -> None:
    with pytest.raises(DomainXmlError, match=reason):
        domain_xml.describe(xml)


def test_with_emulator_refuses_a_domain_without_one() -> None:
    with pytest.raises(DomainXmlError, match="no <emulator>"):
        domain_xml.with_emulator("<domain><name>a</name></domain>", "/q")


def test_without_interfaces_changes_nothing_else() -> None:
    interface = "<interface type='network'>\n      <mac address='52:54:00:00:00:01'/>\n    </interface>"
    xml = PLAIN.replace("</devices>", f"{interface}<interface type='user'/>\n  </devices>")
    assert domain_xml.without_interfaces(xml).split() == PLAIN.split()
    assert domain_xml.without_interfaces(PLAIN) == PLAIN


DISPLAYS = """
    <graphics type='vnc' port='-1' autoport='yes'><listen type='address'/></graphics>
    <graphics type='spice' autoport='yes'/>
    <graphics type='vnc' port='5999' autoport='no'/>
    <graphics type='vnc' socket='/run/vnc'/>
  </devices>"""
LIVE = """<domain><devices>
  <graphics type='vnc' port='5901' autoport='yes' websocket='5700'/>
  <graphics type='spice' port='5902' tlsPort="5903" autoport='yes'/>
  <graphics type='vnc' port='5999' autoport='no'/><graphics type='vnc' socket='/run/vnc'/>
</devices></domain>"""


CONTEXT = "system_u:system_r:svirt_t:s0:c1,c2"
DYNAMIC = "<seclabel type='dynamic' model='selinux' relabel='yes'><label>a:b:c:s0:c9</label></seclabel>"


@pytest.mark.parametrize(
    ("seclabel", "labelled"),
    [
        ("", True),
        (DYNAMIC, True),
        ("<seclabel type='dynamic' model='selinux'><baselabel>a:b:&lt;c&gt;:s0</baselabel></seclabel>", True),
        ("<seclabel type='dynamic' model='dac'/>", True),
        (f"<seclabel type='none' model='dac'/>{DYNAMIC}", True),
        ("<seclabel type='static' model='selinux'><label>a:b:c:s0:c9</label></seclabel>", False),
        ("<seclabel type='none' model='selinux'/>", False),
        ("<seclabel type='none'/>", False),
    ],
)
def test_destination_has_the_label_of_the_source(seclabel: str, labelled: bool) -> None:
    """As long as it runs: libvirt chooses one again for a domain that is started otherwise."""
    xml = PLAIN.replace("</domain>", f"{seclabel}</domain>")
    fixed = f"<seclabel type='static' model='selinux' relabel='yes'><label>{CONTEXT}</label></seclabel>"
    added = domain_xml.for_destination(xml, "/opt/qemu", ENVIRONMENT, "/m", label=CONTEXT)
    assert added.count(fixed) == labelled
    assert added.count("<seclabel ") == max(xml.count("<seclabel "), 1 + ("'dac'" in seclabel) if labelled else 0)
    back = domain_xml.with_emulator(domain_xml.without_additions(added), "/usr/bin/qemu-system-x86_64")
    assert "".join(back.split()) == "".join(xml.split())
    again = domain_xml.for_destination(added, "/q", ENVIRONMENT, "/m", label=CONTEXT)
    assert again.count(fixed) == labelled
    assert fixed not in domain_xml.for_destination(xml, "/opt/qemu", ENVIRONMENT, "/m")


def test_displays_keep_their_ports_until_restored_again() -> None:
    xml = PLAIN.replace("\n  </devices>", DISPLAYS)
    ports = domain_xml.ports(LIVE)
    assert ports == [{"port": "5901"}, {"port": "5902", "tlsPort": "5903"}, {"port": "5999"}, {}]
    pinned = domain_xml.for_destination(xml, "/opt/qemu", ENVIRONMENT, "/run/qmp", ports)
    assert domain_xml.ports(pinned) == ports
    assert pinned.count("autoport='no'") == 3
    again = domain_xml.with_chosen_ports(pinned)
    assert again.count("autoport='yes'") == xml.count("autoport='yes'") == 2
    assert domain_xml.ports(again) == ports  # which libvirt does not look at then
    # The next hop.
    assert domain_xml.without_additions(pinned).count("autoport='yes'") == 2
    assert "SEVHOP" not in domain_xml.without_additions(pinned)
    assert domain_xml.for_destination(pinned, "/opt/qemu", ENVIRONMENT, "/run/qmp", ports) == pinned


def test_displays_without_ports_are_not_marked() -> None:
    xml = PLAIN.replace("\n  </devices>", DISPLAYS)
    none: list[list[dict[str, str]]] = [[], [{}, {}, {}, {}]]
    for ports in none:
        added = domain_xml.for_destination(xml, "/opt/qemu", ENVIRONMENT, "/run/qmp", ports)
        assert "SEVHOP_AUTOPORT" not in added
        assert added.count("autoport='yes'") == 2
