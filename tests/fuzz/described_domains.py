"""Domain XML in any shape, with any content."""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

from hypothesis import strategies as st
from sevhop.libvirt import domain_xml

from .inputs import clean_texts, texts

#: The emulator of every domain.
OLD = "/usr/bin/qemu"

#: Text that XML allows. Leading and trailing white space is ignored in a path or a name.
xml_texts = clean_texts.map(
    lambda text: "".join(c for c in text if c.isprintable() and c not in "\ufffe\uffff").strip()
)
arguments = st.one_of(st.sampled_from(["-chardev", "SEVHOP_KEEPER", "LD_PRELOAD=/lib/adopt.so"]), xml_texts)
variables = st.tuples(
    st.sampled_from(["LD_PRELOAD", "SEVHOP_KEEPER", "SEVHOP_IMAGE", "HOME"]),
    st.one_of(
        xml_texts, st.sampled_from(["/lib/adopt.so", "/lib/own.so:/lib/adopt.so", "/x/adopt.so:/y/adopt.so", ""])
    ),
)


@st.composite
def commandlines(draw: st.DrawFn) -> str:
    """What libvirt passes through to QEMU, in any shape that XML allows."""
    prefix = draw(st.sampled_from(["qemu", "q", "sevhop", ""]))
    tag = f"{prefix}:" if prefix else ""
    gap = draw(st.sampled_from(["", " ", "\n    ", "<!-- > -->"]))
    declared = f"xmlns:{prefix}" if prefix else "xmlns"
    parts = []
    for passed in draw(st.lists(st.one_of(arguments, variables), max_size=6)):
        end = draw(st.sampled_from(["/>", " />", f"></{tag}%s>", f"\n></{tag}%s >"]))
        if isinstance(passed, tuple):
            parts.append(
                f"<{tag}env name={quoteattr(passed[0])}\tvalue={quoteattr(passed[1])}" + end.replace("%s", "env")
            )
        else:
            parts.append(f"<{tag}arg value={quoteattr(passed)}" + end.replace("%s", "arg"))
    return f"{gap}<{tag}commandline {declared}='{domain_xml.NAMESPACE}'>{gap}{gap.join(parts)}</{tag}commandline>"


@st.composite
def domains(draw: st.DrawFn) -> str:
    """A domain as libvirt could describe one, with any content."""
    name, note = draw(xml_texts), draw(xml_texts)
    extra = "".join(draw(st.lists(commandlines(), max_size=2)))
    return (
        "<?xml version='1.0' encoding='UTF-8'?>\n<domain type='kvm'>\n"
        f"  <name>{escape(name)}</name>\n  <uuid>1-2</uuid>\n"
        f"  <metadata><n:a xmlns:n={quoteattr('u ' + note.replace('}', ''))}>"
        f"<emulator>{escape(note)}</emulator></n:a></metadata>\n"
        f"  <!-- {escape(note).replace('--', '')}> -->\n"
        f"  <os><type arch='x86_64' machine={quoteattr(note)}>hvm</type></os>\n"
        f"  <devices>\n    <emulator>{OLD}</emulator>\n  </devices>{extra}\n</domain>\n"
    )


marked = domains().map(lambda xml: xml.replace("<devices>", "<x a='SEVHOP_IMAGE'/><devices>"))
xmls = st.one_of(texts, domains(), marked, texts.map(lambda text: f"'SEVHOP_{text}<uuid>{text}</uuid>"))
