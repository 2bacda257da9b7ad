"""A domain's XML as libvirt gives it to its hook: before a hop, after one, in its save image, restored from that."""

from __future__ import annotations

UUID = "11111111-2222-3333-4444-555555555501"
XML = f"""<domain type='kvm'>
  <name>web</name>
  <uuid>{UUID}</uuid>
  <devices><emulator>/usr/bin/qemu</emulator></devices>
</domain>
"""
LEFT = (
    "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
    "<qemu:env name='SEVHOP_KEEPER' value='/run/sevhop/0/keeper'/></qemu:commandline></domain>"
)
HOPPED = XML.replace("</domain>", LEFT)
IMAGE = HOPPED.replace("<qemu:env", "<qemu:env name='SEVHOP_IMAGE' value='without RAM'/><qemu:env", 1)
DESTINATION = IMAGE.replace("SEVHOP_IMAGE", "SEVHOP_RESTORED")
