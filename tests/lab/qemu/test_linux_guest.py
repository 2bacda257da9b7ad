"""
OVMF and Debian's Linux, as SEV and as SEV-ES guests, hop and lose nothing: no tick, no page, no block of the disk.

The guest's kernel has nothing to warn of. A guest boots for a minute, or some if the machine is busy, so that it hops
often then.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.guests import emulators, linux
from tests.support.guests.machine import Machine
from tests.support.guests.running import Guest

from ...conftest import NOTED
from ...qemu.hops import HopDriver
from ..contract.sev import POLICY_SEV_ES, contexts

#: Seconds until a guest has booted, or counted on.
BOOT = 1200.0
#: Seconds for a step of a hop.
PATIENCE = 120.0
HOPS = 10

POLICIES = {"sev": 1, "sev-es": 1 | POLICY_SEV_ES}
#: What the guest's kernel reports to be active.
FEATURES = {"sev": "AMD SEV", "sev-es": "AMD SEV SEV-ES"}

#: Boots a guest with this context, in a QEMU, with so many vCPUs; it counts.
Boot = Callable[[str, str, int], Guest]


@pytest.fixture
def boot(tmp_path: Path) -> Iterator[Boot]:
    """Boot guests that are killed when the test ends."""
    with ExitStack() as guests:

        def booted(context: str, label: str, cpus: int) -> Guest:
            machine = linux.on(
                # A model by name: with "host" a newer QEMU gives the guest more, and to go back would be a loss.
                Machine(tmp_path / "guest", accelerator="kvm", cpu="EPYC", cpus=cpus, sev_policy=POLICIES[context])
            )
            guest = guests.enter_context(Guest.start(machine, emulators.emulator(label)))
            active = guest.wait_for_line("ENCRYPTION ", BOOT)
            assert active == f"ENCRYPTION {FEATURES[context]}"
            assert guest.wait_for_line("CPUS ", BOOT) == f"CPUS {cpus}"
            guest.wait_for_ticks(5, BOOT)
            return guest

        yield booted
    assert contexts() == []


def warnings(guest: Guest) -> list[str]:
    """What the guest's kernel has warned of."""
    return [text for text in guest.seen().warnings if not text.startswith(linux.SLOW)]


def hop(guest: Guest, context: str, labels: Sequence[str]) -> list[float]:
    """
    Hop a guest from one QEMU to the next, in which it counts on each time, and judge it in the end.

    :return: the downtime of each hop, in milliseconds of the lab's clock.
    """
    before, downtimes = warnings(guest), []
    for label in labels:
        report = HopDriver().run(guest, emulators.emulator(label), timeout=PATIENCE, start_timeout=PATIENCE)
        assert (report.outcome, report.context, report.notes) == ("done", context, [])
        assert report.move is not None
        assert report.move.errno == 0
        assert report.downtime_ms is not None
        downtimes.append(report.downtime_ms)
        guest.wait_for_ticks(5, BOOT)
        (moved,) = contexts()
        sev = guest.execute("query-sev")
        assert (sev["state"], sev["policy"], sev["handle"]) == ("running", POLICIES[context], moved.handle)
    guest.wait_for_ticks(linux.MEMORY_TICKS, BOOT)
    assert warnings(guest) == before
    verdict = guest.stop()
    assert verdict.unharmed, verdict
    assert verdict.writes
    return downtimes


@pytest.mark.one_kernel("6.12")
def test_linux_guest_hops_there_and_back(kernel: str, boot: Boot) -> None:
    """With SEV-ES, on the first kernel with SEV; both on all of them run with the marker ``long``."""
    context = "sev" if kernel == "6.1" else "sev-es"
    guest = boot(context, emulators.OLD, 2)
    hop(guest, context, (emulators.NEW, emulators.OLD))


@pytest.mark.long
@pytest.mark.parametrize("labels", [(emulators.NEW, emulators.OLD), (emulators.NEW, emulators.UNSTABLE)], ids="-".join)
@pytest.mark.parametrize("cpus", [1, 2])
@pytest.mark.parametrize("context", POLICIES)
def test_linux_guest_hops_ten_times(
    context: str, cpus: int, labels: tuple[str, ...], boot: Boot, record_property: Callable[[str, object], None]
) -> None:
    """To and fro, beginning in the second QEMU: 11.1 cannot load virtio devices of a guest that was started in 10.0."""
    guest = boot(context, labels[-1], cpus)
    downtimes = hop(guest, context, list(itertools.islice(itertools.cycle(labels), HOPS)))
    found = f"downtime {min(downtimes):.0f} to {max(downtimes):.0f} ms"
    record_property(NOTED, f"{context}, vCPUs: {cpus}, {', '.join(labels)}: {found}")
