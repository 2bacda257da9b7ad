"""What the keeper answers libvirt's hook, and what a keeper is told at its start."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from sevhop.custody import Custody
from sevhop.guest import SevContext
from sevhop.keeper import Held
from sevhop.keeper_process import Brief, State
from sevhop_qmp.ram_blocks import RamBlock

UUID = "11111111-2222-3333-4444-55555555550a"
BLOCKS = (
    RamBlock("pc.ram", 0x7F0000000000, 1 << 26, 1 << 26, ("00:01", 4711), True),
    RamBlock("pc.rom", 0x7F1000000000, 1 << 17, 1 << 17, None, False),
)


def brief() -> Brief:
    return Brief(
        name="web",
        uuid=UUID,
        pid=os.getpid(),
        uid=os.getuid(),
        gid=os.getgid(),
        emulator="/opt/qemu",
        context=SevContext("sev", 1, 7, "ab" * 48),
        blocks=BLOCKS,
        encrypted=("pc.bios",),
    )


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


async def ask(custody: Custody, request: str) -> str:
    with socket.socket() as sock:
        answer, fd = await custody.answer_control(sock, request.encode())
    assert fd is None
    return answer


@pytest.fixture
def custody(tmp_path: Path) -> Custody:
    (tmp_path / "monitor").mkdir()
    return Custody(brief(), tmp_path, Held(None, {}))


def test_brief_survives_the_way() -> None:
    assert Brief.from_json(brief().as_json()) == brief()


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("step", ["restore begin", "prepare begin", "started begin", "reconnect begin", "gibberish -"])
def test_a_foreign_domain_is_left_alone(custody: Custody, state: State, step: str) -> None:
    custody.state = state
    assert run(ask(custody, f"hook {step} 22222222-2222-3333-4444-555555555501")) == "foreign"
    assert run(ask(custody, f"hook {step} -")) == "foreign"
    assert custody.state is state


RESTORABLE = {State.WAITING, State.RESTORING, State.COMMITTED}


@pytest.mark.parametrize("state", State)
def test_only_what_is_held_can_be_restored(custody: Custody, state: State) -> None:
    custody.state = state
    answer = run(ask(custody, f"hook restore begin {UUID.upper()}"))
    assert answer == "ok /opt/qemu" if state in RESTORABLE else answer.startswith("no ")
    assert custody.state is (State.RESTORING if state in RESTORABLE else state)


@pytest.mark.parametrize("state", State)
def test_nobody_starts_a_held_domain_afresh(custody: Custody, state: State) -> None:
    custody.state = state
    answer = run(ask(custody, f"hook prepare begin {UUID}"))
    assert answer.startswith("no ") == (state in {State.HELD, State.RETIRING, State.WAITING})


@pytest.mark.parametrize("state", set(State) - {State.RESTORING})
def test_nothing_is_committed_without_a_restore(custody: Custody, state: State) -> None:
    custody.state = state
    answer = run(ask(custody, f"hook started begin {UUID}"))
    assert answer == ("ok" if state is State.OVER else f"no the guest is {state.value}, there is nothing to start")


@pytest.mark.parametrize("state", set(State) - {State.RESTORING})
def test_no_destination_is_served_without_a_restore(custody: Custody, state: State) -> None:
    custody.state = state
    with socket.socket() as sock:
        answer, fd = run(custody.answer_destination(sock, b"hello 1"))
    assert answer.startswith("no ")
    assert fd is None


def test_destination_is_told_that_the_source_has_ended(custody: Custody) -> None:
    custody.state = State.RESTORING
    with socket.socket() as sock:
        answer, _ = run(custody.answer_destination(sock, b"hello 1"))
    assert answer.startswith("ok context=sev source=ended handle=7 measurement=abab")


def test_source_must_have_ended(custody: Custody) -> None:
    """Here the source is this very test."""
    assert run(ask(custody, "ended")).startswith("no ")
    assert run(ask(custody, "retire")) == "ok"
    assert run(ask(custody, "ended")) == "no the source is still there"
    assert custody.state is State.RETIRING


@pytest.mark.parametrize("request_text", ["", " ", "emulator", "emulator ", "hook", "hook a b", "nonsense", "blocks x"])
def test_nonsense_changes_nothing(custody: Custody, request_text: str) -> None:
    custody.state = State.WAITING
    assert run(ask(custody, request_text)).startswith("no ")
    assert custody.state is State.WAITING


def test_another_emulator(custody: Custody) -> None:
    custody.state = State.WAITING
    assert run(ask(custody, "emulator /old qemu")) == "ok"
    assert run(ask(custody, f"hook restore begin {UUID}")) == "ok /old qemu"
