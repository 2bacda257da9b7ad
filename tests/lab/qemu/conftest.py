"""SEV guests in stock QEMU, in the lab."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.guests import emulators, es_counter, real_mode
from tests.support.guests.machine import Machine
from tests.support.guests.running import Guest

from ..contract.sev import POLICY_SEV_ES, contexts

#: Describes a SEV guest that runs the real-mode counter: its policy, and arguments for the command line.
DescribeSev = Callable[..., Machine]
#: Starts a guest that is killed when the test ends.
StartGuest = Callable[[Machine], Guest]
#: Starts a counting SEV-ES guest in a QEMU, with so many vCPUs.
StartEs = Callable[..., Guest]


@pytest.fixture
def sev_machine(tmp_path: Path) -> DescribeSev:
    """Describe a SEV guest in a directory of its own."""

    def describe(name: str = "guest", policy: int = 0, more: tuple[str, ...] = ()) -> Machine:
        return Machine(
            tmp_path / name,
            accelerator="kvm",
            # A model by name: with "host" a newer QEMU gives the guest more, and to go back would be a loss.
            cpu="EPYC",
            memory_mib=32,
            bios=real_mode.firmware(),
            sev_policy=policy,
            more=more,
        )

    return describe


@pytest.fixture
def start() -> Iterator[StartGuest]:
    """Start guests in the machine's own QEMU. No context may be left when they have exited."""
    with ExitStack() as guests:
        yield lambda machine: guests.enter_context(Guest.start(machine, emulators.installed()))
    assert contexts() == []


@pytest.fixture
def start_es(tmp_path: Path) -> Iterator[StartEs]:
    """Start SEV-ES guests that run the counter for them."""
    with ExitStack() as guests:

        def start(label: str, cpus: int = 1) -> Guest:
            machine = Machine(
                tmp_path / "guest",
                accelerator="kvm",
                # A model by name: with "host" a newer QEMU gives the guest more, and to go back would be a loss.
                cpu="EPYC",
                cpus=cpus,
                memory_mib=32,
                bios=es_counter.firmware(),
                sev_policy=POLICY_SEV_ES | 1,
            )
            guest = guests.enter_context(Guest.start(machine, emulators.emulator(label)))
            guest.wait_for_ticks(5)
            return guest

        yield start
