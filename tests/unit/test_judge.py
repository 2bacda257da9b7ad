"""How guests are judged: whoever loses a tick, or lives twice, is found out."""

from __future__ import annotations

import pytest

from tests.support.guests.judge import Verdict, judge_log


def verdict_of(*lines: str) -> Verdict:
    return judge_log("".join(f"{line}\n" for line in lines))


def test_counter_without_errors_is_unharmed() -> None:
    verdict = verdict_of("START", "00000001", "00000002", "00000003")
    assert verdict.unharmed
    assert (verdict.ticks, verdict.last) == (3, 3)


def test_linux_without_errors_is_unharmed() -> None:
    verdict = verdict_of("START\r", "TICK 1 w=0 r=1 ping=0 mem=0\r", "UEFI 1\r", "TICK 2 w=0 r=2 ping=0 mem=0\r")
    assert verdict.unharmed
    assert verdict.writes


def test_warnings_are_kept_and_do_no_harm() -> None:
    verdict = verdict_of("START", "WARNING clock is slow\r", "TICK 1 w=0 r=1 ping=0 mem=0\r", "WARNING again\r")
    assert verdict.warnings == ["clock is slow", "again"]
    assert verdict.unharmed


def test_log_without_ticks_is_not_unharmed() -> None:
    assert not verdict_of("START").unharmed


def test_missing_numbers_are_lost_ticks() -> None:
    verdict = verdict_of("START", "00000001", "00000005", "00000006")
    assert verdict.ticks_lost == 3
    assert not verdict.ticks_repeated


def test_ticks_are_repeated_if_their_numbers_go_back() -> None:
    verdict = verdict_of("START", "00000001", "00000002", "00000003", "00000002", "00000003", "00000004")
    assert verdict.ticks_repeated == 2
    assert not verdict.ticks_lost


def test_restart_is_neither_lost_nor_repeated() -> None:
    verdict = verdict_of("START", "00000001", "00000002", "START", "00000001")
    assert (verdict.restarts, verdict.ticks_lost, verdict.ticks_repeated) == (1, 0, 0)


def test_garbled_line_is_a_lost_tick() -> None:
    assert verdict_of("START", "00000001", "000000000002", "00000003").ticks_lost == 1


def test_unfinished_line_does_not_count() -> None:
    assert judge_log("START\n00000001\n0000").unharmed


def test_firmware_may_write_before_the_start() -> None:
    assert verdict_of("SeaBIOS (version 1.16.2)", "\x1b[2JSTART", "00000001").unharmed


@pytest.mark.parametrize(
    ("line", "disk", "network", "memory"),
    [
        ("TICK 2 w=5 r=0 ping=0 mem=0", 1, 0, 0),
        ("TICK 2 w=0 r=1 ping=0 mem=0", 1, 0, 0),
        ("TICK 2 w=0 r=2 ping=1 mem=0", 0, 1, 0),
        ("TICK 2 w=0 r=2 ping=0 mem=7", 0, 0, 7),
        ("BAD 00412000", 0, 0, 1),
    ],
)
def test_errors_of_the_guest_are_counted(line: str, disk: int, network: int, memory: int) -> None:
    verdict = verdict_of("START", "TICK 1 w=0 r=1 ping=0 mem=0", line)
    assert (verdict.disk_errors, verdict.network_errors, verdict.memory_errors) == (disk, network, memory)
    assert not verdict.unharmed
