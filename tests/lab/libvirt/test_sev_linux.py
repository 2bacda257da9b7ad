"""
A domain with OVMF and Debian's Linux, encrypted by SEV and by SEV-ES, hops under a real libvirt daemon. Its virtio disk
and its network card reach only the memory that the guest lends them (``iommu='on'``). The card is in a bridge, and the
kernel moves its packets (vhost-net), but not in the transit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from tests.support.guests import emulators, linux
from tests.support.guests.daemon import Daemon, Description, DomainGuest
from tests.support.guests.running import wait_until

from ...conftest import NOTED
from ..contract.sev import POLICY_SEV_ES, contexts

#: Seconds until a guest has booted, or counted on.
BOOT = 1200.0
HOPS = 10
POLICIES = {"sev": 1, "sev-es": 1 | POLICY_SEV_ES}
CARD = """<interface type='bridge'><source bridge='{}'/><model type='virtio'/><driver name='vhost' iommu='on'/>
    </interface>"""
#: What the guest's kernel reports to be active.
FEATURES = {"sev": "AMD SEV", "sev-es": "AMD SEV SEV-ES"}


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """A daemon, with sevhop's hook."""
    with Daemon.installed() as daemon:
        yield daemon


@pytest.fixture
def bridge(daemon: Daemon) -> Iterator[str]:
    with daemon.bridge() as name:
        yield name


def has_printed(guest: DomainGuest, line: str) -> bool:
    return line in guest.file("log").read_text(errors="replace").replace("\r", "").splitlines()


def warnings(guest: DomainGuest) -> list[str]:
    """What the guest's kernel has warned of."""
    return [text for text in guest.seen().warnings if not text.startswith(linux.SLOW)]


@pytest.mark.long
@pytest.mark.parametrize("labels", [(emulators.NEW, emulators.OLD), (emulators.NEW, emulators.UNSTABLE)], ids="-".join)
@pytest.mark.parametrize("cpus", [1, 2])
@pytest.mark.parametrize("context", POLICIES)
def test_linux_domain_changes_its_qemu_ten_times(
    context: str,
    cpus: int,
    labels: tuple[str, ...],
    daemon: Daemon,
    bridge: str,
    record_property: Callable[[str, object], None],
) -> None:
    """To and fro, beginning in the second QEMU: 11.1 cannot load virtio devices of a guest that was started in 10.0."""
    description = Description(
        f"linux-{context}-{cpus}-{labels[-1]}",
        emulators.emulator(labels[-1]),
        "kvm",
        linux.SEV_MEMORY_MIB,
        vcpus=cpus,
        sev=True,
        policy=POLICIES[context],
        linux=linux.images(),
        interface=CARD.format(bridge),
        uefi=True,
    )
    guest = DomainGuest.start(daemon, description)
    try:
        wait_until(lambda: has_printed(guest, f"ENCRYPTION {FEATURES[context]}"), BOOT, "the guest is encrypted")
        guest.wait_for_ticks(5, BOOT)
        launch, before = daemon.virsh("domlaunchsecinfo", guest.name), warnings(guest)
        downtimes = []
        for label in itertools.islice(itertools.cycle(labels), HOPS):
            emulator = emulators.emulator(label)
            report = daemon.upgrade(guest.name, "--emulator", emulator, "--timeout", "300")
            assert report["outcome"] == "done", report
            assert (report["context"], report["move"]["errno"], report["notes"]) == (context, 0, [])
            downtimes.append(report["downtime_ms"])
            assert guest.emulator() == guest.emulator("--inactive") == str(emulator)
            guest.wait_for_ticks(5, BOOT)
            assert daemon.virsh("domlaunchsecinfo", guest.name) == launch
        found = f"downtime {min(downtimes):.0f} to {max(downtimes):.0f} ms"
        record_property(NOTED, f"{context}, vCPUs: {cpus}, {', '.join(labels)}: {found}")
        guest.wait_for_ticks(linux.MEMORY_TICKS, BOOT)
        assert warnings(guest) == before
        daemon.virsh("destroy", guest.name)
        verdict = guest.judge()
        assert verdict.unharmed, verdict
        assert verdict.writes
    finally:
        guest.end()
    assert contexts() == []
    assert daemon.left_over() == []
