"""
At most one QEMU runs the guest, and it is not lost while a process that has it lives: searched for, not shown by
example.

The real engine (:mod:`sevhop.engine.hop`) and the real recovery (:mod:`sevhop.engine.hop_recovery`,
:mod:`sevhop.engine.ownership`) act on simulated QEMUs. Before each of their actions anything may happen: they are
killed, or interrupted; the destination proceeds, halts, exits; somebody resumes, stops or kills either QEMU at its
monitor; a recovery runs, and is killed as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sevhop.engine.recovery_result import RecoveredGuest, RecoveryOutcome
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.monitor import Monitor
from sevhop_qmp.run_mark import RunState

from .simulated_qemus import Actor, Qemu, SimulatedHop, SimulatedRecovery, World

#: Turns of the event loop in which all have come to their next gates.
_TURNS = 40
#: Steps in which an undisturbed hop, destination or recovery is done.
_ENOUGH = 200

few = st.integers(min_value=1, max_value=6)


async def at_once(work: Any, *arguments: Any) -> Any:
    """Instead of :func:`asyncio.to_thread`."""
    return work(*arguments)


class OneRunnableVmm(RuleBasedStateMachine):
    """What may happen."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.loop = asyncio.new_event_loop()
        self.directory = Path(tempfile.mkdtemp(prefix="sevhop-model-"))
        self.stopped = False
        self.recoveries: list[SimulatedRecovery] = []
        self.patch.setattr(asyncio, "to_thread", at_once)
        SimulatedHop.simulate(self.patch)

    @initialize(running=st.sampled_from([True, True, True, False]), steps=st.integers(min_value=0, max_value=20))
    def hop_begins(self, running: bool, steps: int) -> None:
        """It is disturbed after so many steps only: most of what is of interest is there."""
        self.world = World(self.directory / "hop", running=running)
        self.hop = SimulatedHop(self.world)
        self.begin(self.hop.actor, self.hop.run())
        self.hop_goes_on(steps)

    # -- the machinery -----------------------------------------------------------------------------

    def begin(self, actor: Actor, work: Any) -> None:
        async def expected() -> None:
            with contextlib.suppress(SevhopError):
                await work

        actor.task = self.loop.create_task(expected())
        self.turn()

    def turn(self) -> None:
        async def turns() -> None:
            for _ in range(_TURNS):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())
        for actor in self.actors():
            if actor.task.done() and not actor.task.cancelled() and not actor.over:
                actor.task.result()  # what is not expected, above all what is Broken

    def actors(self) -> list[Actor]:
        return [self.hop.actor, *(recovery.actor for recovery in self.recoveries)]

    def step(self, actor: Actor) -> bool:
        moved = actor.open_gate()
        self.turn()
        return moved

    @property
    def hopping(self) -> bool:
        return not self.hop.actor.dead and not self.hop.actor.task.done()

    @property
    def recovering(self) -> bool:
        return bool(self.recoveries) and not (self.recoveries[-1].actor.dead or self.recoveries[-1].actor.task.done())

    @property
    def destination(self) -> Qemu | None:
        return self.world.destination

    def destination_lives(self) -> bool:
        return self.destination is not None and self.destination.alive

    # -- the command -------------------------------------------------------------------------------

    @precondition(lambda self: self.hopping)
    @rule(steps=few)
    def command_goes_on(self, steps: int) -> None:
        for _ in range(steps):
            self.step(self.hop.actor)

    @precondition(lambda self: self.hopping)
    @rule(steps=few)
    def hop_goes_on(self, steps: int) -> None:
        for _ in range(steps):
            self.step(self.hop.actor)
            self.world.destination_step(not self.hopping)
            self.turn()

    @precondition(lambda self: self.hopping)
    @rule()
    def command_is_killed(self) -> None:
        self.hop.killed()

    @precondition(lambda self: self.hopping)
    @rule()
    def command_is_interrupted(self) -> None:
        self.hop.interrupt()
        self.turn()

    # -- the recovery ------------------------------------------------------------------------------

    @precondition(lambda self: not self.hopping and not self.recovering and self.world.entry is not None)
    @rule()
    def recovery_begins(self) -> None:
        recovery = SimulatedRecovery(self.world)
        self.recoveries.append(recovery)
        self.patch.setattr(Monitor, "connect", recovery.connect)
        self.begin(recovery.actor, recovery.run())

    @precondition(lambda self: self.recovering)
    @rule(steps=few)
    def recovery_goes_on(self, steps: int) -> None:
        for _ in range(steps):
            self.step(self.recoveries[-1].actor)

    @precondition(lambda self: self.recovering)
    @rule()
    def recovery_is_killed(self) -> None:
        self.recoveries[-1].actor.dead = True

    # -- the destination ---------------------------------------------------------------------------

    @precondition(lambda self: self.destination_lives())
    @rule(steps=few)
    def destination_goes_on(self, steps: int) -> None:
        for _ in range(steps):
            self.world.destination_step(not self.hopping)
            self.turn()

    @precondition(lambda self: self.destination_lives())
    @rule()
    def destination_halts(self) -> None:
        assert self.destination is not None
        self.destination.halted = True

    @precondition(lambda self: self.destination_lives() and not self.recovering)
    @rule()
    def destination_wakes_up(self) -> None:
        assert self.destination is not None
        self.destination.halted = False

    @precondition(lambda self: self.destination_lives())
    @rule()
    def destination_ends(self) -> None:
        assert self.destination is not None
        self.world.die(self.destination)

    # -- somebody at a monitor ---------------------------------------------------------------------

    @precondition(lambda self: self.world.source.answers)
    @rule(command=st.sampled_from(["cont", "cont", "stop", "quit"]))
    def somebody_commands_the_source(self, command: str) -> None:
        self.command(self.world.source, command)

    @precondition(lambda self: self.destination_lives() and self.destination.loaded and self.destination.answers)
    @rule(command=st.sampled_from(["cont", "stop", "quit"]))
    def somebody_commands_the_destination(self, command: str) -> None:
        assert self.destination is not None
        if self.world.step in ("starting", "sent", "refused"):
            return  # it is about to run, and reads no monitor
        self.command(self.destination, command)

    def command(self, qemu: Qemu, command: str) -> None:
        match command:
            case "cont":
                self.world.cont(qemu)
            case "stop":
                self.stopped = True
                self.world.stop(qemu)
            case "quit":
                self.world.die(qemu)
        self.turn()

    @precondition(lambda self: self.world.source.alive)
    @rule()
    def source_is_killed(self) -> None:
        self.world.die(self.world.source)

    @rule()
    def time_passes(self) -> None:
        self.turn()

    # -- what holds --------------------------------------------------------------------------------

    @invariant()
    def one_runs(self) -> None:
        if hasattr(self, "world"):
            self.world.look()

    def teardown(self) -> None:
        try:
            if hasattr(self, "world"):
                self.comes_to_a_good_end()
        finally:
            for actor in self.actors() if hasattr(self, "hop") else []:
                actor.end()
            if hasattr(self, "hop"):
                tasks = asyncio.gather(*(actor.task for actor in self.actors()), return_exceptions=True)
                self.loop.run_until_complete(tasks)
                self.world.close()
            self.loop.close()
            self.patch.undo()
            shutil.rmtree(self.directory, ignore_errors=True)

    def comes_to_a_good_end(self) -> None:
        """When nothing happens any more, and recover is run, the guest is where somebody had it."""
        world = self.world
        self.all_goes_on()
        if self.destination is not None and self.destination.halted:
            self.recovers()
            self.one_runs()
            self.destination.halted = False
            self.all_goes_on()
        had, to_recover = bool(world.holders()), world.entry is not None
        undecided = world.mark is not None and world.mark.read() is RunState.STARTING
        result = self.recovers()
        self.one_runs()
        assert not had or world.holders()
        if world.entry is not None:
            # Only what is unknown requires manual action.
            assert undecided, f"{self.recoveries[-1].stuck}"
            assert not self.destination_lives()
            return
        if result is not None and to_recover:
            assert (result.result is RecoveryOutcome.GONE) == (not had)
        if had and world.running and not self.stopped:
            assert [qemu for qemu in (world.source, self.destination) if qemu is not None and qemu.executes]

    def all_goes_on(self) -> None:
        for _ in range(_ENOUGH):
            moved = self.hopping and self.step(self.hop.actor)
            moved |= self.recovering and self.step(self.recoveries[-1].actor)
            moved |= self.world.destination_step(not self.hopping)
            if not moved:
                break

    def recovers(self) -> RecoveredGuest | None:
        """:return: what the last recovery came to, if there was anything to recover."""
        for _ in range(2):
            if self.world.entry is None:
                break
            self.recovery_begins()
            while self.step(self.recoveries[-1].actor):
                pass
        return self.recoveries[-1].result if self.recoveries and self.world.entry is None else None


def test_guest_is_runnable_in_at_most_one_vmm() -> None:
    run_state_machine_as_test(
        OneRunnableVmm,
        settings=settings(
            max_examples=300,
            stateful_step_count=15,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
