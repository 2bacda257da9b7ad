"""Filters are compared by what they forbid, not by their code."""

from __future__ import annotations

import pytest
from sevhop.process.seccomp_filter import Program, UnknownFilter, lost

ALLOW, ERRNO, KILL, LOG = 0x7FFF0000, 0x00050001, 0x80000000, 0x7FFC0000
ARCHITECTURE, NUMBER, FIRST, SECOND = 4, 0, 16, 24


def load(offset: int) -> tuple[int, int, int, int]:
    return (0x20, 0, 0, offset)


def forbids(*numbers: int, action: int = ERRNO) -> Program:
    """A filter that forbids some system calls, of every architecture."""
    code = [load(NUMBER)]
    for number in numbers:
        code += [(0x15, 0, 1, number), (0x06, 0, 0, action)]
    return (*code, (0x06, 0, 0, ALLOW))


#: sched_setscheduler with another policy than SCHED_IDLE, as in QEMU.
FORBIDS_A_POLICY: Program = (
    load(NUMBER),
    (0x15, 0, 3, 144),
    load(SECOND),
    (0x15, 1, 0, 5),
    (0x06, 0, 0, ERRNO),
    (0x06, 0, 0, ALLOW),
)
#: clone without CLONE_VM.
FORBIDS_PROCESSES: Program = (
    load(NUMBER),
    (0x15, 0, 4, 56),
    load(FIRST),
    (0x54, 0, 0, 0x100),
    (0x15, 0, 1, 0),
    (0x06, 0, 0, KILL),
    (0x06, 0, 0, ALLOW),
)


@pytest.mark.parametrize(
    "program", [forbids(59), forbids(59, 57, 101), forbids(59, action=KILL), FORBIDS_A_POLICY, FORBIDS_PROCESSES]
)
def test_filter_is_lost_only_if_it_is_missing(program: Program) -> None:
    assert lost([program], [program]) == []
    assert lost([], [program]) == []
    assert lost([program], [])


def test_filters_lose_nothing_if_reordered_or_stricter() -> None:
    assert lost([forbids(59, 57)], [forbids(57, 59)]) == []
    assert lost([forbids(59)], [forbids(57, 59, 101)]) == []
    assert lost([forbids(59), forbids(57)], [forbids(59, 57), forbids()]) == []


def test_system_call_that_is_allowed_now_is_reported() -> None:
    assert "59 of x86-64" in lost([forbids(59, 57)], [forbids(57)])
    assert lost([forbids(59, action=LOG)], [forbids()]) == []


def test_filter_is_lost_if_it_tests_other_arguments() -> None:
    other = tuple((code, true, false, 6 if value == 5 else value) for code, true, false, value in FORBIDS_A_POLICY)
    assert "144 of x86-64" in lost([FORBIDS_A_POLICY], [forbids()])
    assert "144 of x86-64" in lost([FORBIDS_A_POLICY], [other])
    assert lost([FORBIDS_A_POLICY], [forbids(144)]) == []
    assert "56 of x86-64" in lost([FORBIDS_PROCESSES], [forbids()])


@pytest.mark.parametrize("program", [((0xFF, 0, 0, 0),), ((0x05, 0, 0, 100),), (load(NUMBER),)])
def test_invalid_program_is_refused(program: Program) -> None:
    with pytest.raises(UnknownFilter):
        lost([program], [forbids()])
