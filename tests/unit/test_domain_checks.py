"""Devices of a domain that cannot be re-created when its old QEMU has exited."""

from __future__ import annotations

import pytest
from sevhop.checks.domain import _NOT_RECREATABLE, devices
from sevhop.checks.result import Status

DOMAIN = """<domain type='kvm' xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web</name>
  <metadata><tpm xmlns='http://example.org/tpm'/><hostdev/></metadata>
  <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
  <devices>
    <disk type='file' device='disk'><source file='/a'/><target dev='vda'/></disk>
    <interface type='ethernet'><target dev='tap0'/></interface>
    <interface type='bridge'><source bridge='br0'/></interface>
    <serial type='pty'/><memballoon model='virtio'/><rng model='virtio'/>
    <memory model='dimm'/>
    <video><model type='vga'/></video><tpm model='tpm-crb'><backend type='emulator'/></tpm>
    {}
  </devices>
</domain>"""

EXAMPLES = {
    "<tpm model='tpm-crb'><backend type='passthrough'/></tpm>": "<backend type='passthrough'> of a <tpm>",
    "<tpm model='tpm-crb'><backend type='external'/></tpm>": "<backend type='external'> of a <tpm>",
    "<filesystem type='mount'/>": "<filesystem>",
    "<shmem name='x'/>": "<shmem>",
    "<hostdev mode='subsystem' type='pci'/>": "<hostdev>",
    "<interface type='hostdev'/>": "<interface type='hostdev'>",
    "<interface type='vdpa'/>": "<interface type='vdpa'>",
    "<interface type='vhostuser'/>": "<interface type='vhostuser'>",
    "<disk type='nvme'/>": "<disk type='nvme'>",
    "<disk type='vhostuser'/>": "<disk type='vhostuser'>",
    "<vsock model='virtio'><cid auto='yes'/></vsock>": "<vsock>",
    "<disk type='file'><transient/></disk>": "<transient> of a <disk>",
    "<video><driver name='vhostuser'/></video>": "<driver name='vhostuser'> of a <video>",
    "<memory model='nvdimm'><source><path>/x</path></source></memory>": "<memory model='nvdimm'>",
    "<memory model='virtio-pmem'/>": "<memory model='virtio-pmem'>",
    "<memory model='virtio-mem'/>": "<memory model='virtio-mem'>",
}


def test_devices_pass_if_libvirt_re_creates_them() -> None:
    assert devices(DOMAIN.format("")).status is Status.PASS


@pytest.mark.parametrize("device", EXAMPLES)
def test_devices_fail_that_cannot_be_re_created(device: str) -> None:
    result = devices(DOMAIN.format(device))
    assert result.status is Status.FAIL
    assert result.detail.startswith(f"{EXAMPLES[device]}: ")
    assert result.hint


def test_every_unsupported_device_has_an_example() -> None:
    assert len(EXAMPLES) == len(_NOT_RECREATABLE)


def test_unsupported_devices_are_all_reported() -> None:
    result = devices(DOMAIN.format("<shmem/><hostdev/>"))
    assert "<shmem>" in result.detail
    assert "<hostdev>" in result.detail
