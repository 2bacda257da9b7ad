"""
The retry policy of the move.

The destination is played by a fake monitor here, because the kernel cannot be made busy at will on a machine without
SEV. What it answers is checked against the real thing in the SEV lab.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from sevhop_qmp import misc_cgroup
from sevhop_qmp.errors import MoveError
from sevhop_qmp.monitor import Monitor
from sevhop_qmp.move import ERRNOS, MoveReport, explain, move


class FakeDestination:
    """Answers x-sev-migrate-from with one errno after the other, the last one for ever."""

    name = "destination"

    def __init__(self, *errnos: int) -> None:
        self.errnos = list(errnos)
        self.handed_over = 0

    async def send_fd(self, name: str, fd: int) -> None:
        self.handed_over += 1

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        assert command == "x-sev-migrate-from"
        number = self.errnos.pop(0) if len(self.errnos) > 1 else self.errnos[0]
        name = errno.errorcode.get(number, "")
        return {"errno": number, "name": name, "vcpus": 0, "registers": 0, "restore-errno": 0}


def run(destination: FakeDestination, deadline: float = 2.0) -> MoveReport:
    return asyncio.run(move(cast(Monitor, destination), 1, 0, deadline=deadline))


def test_move_succeeds_at_once() -> None:
    destination = FakeDestination(0)
    report = run(destination)
    assert (report.attempts, report.errno, destination.handed_over) == (1, 0, 1)


def test_move_is_retried_with_a_new_descriptor_if_transient() -> None:
    destination = FakeDestination(errno.EBUSY, errno.EINTR, errno.EBUSY, 0)
    assert run(destination).attempts == 4
    assert destination.handed_over == 4


@pytest.mark.parametrize("number", [n for n, row in ERRNOS.items() if not row.retry] + [errno.EPERM])
def test_move_is_not_retried_after_a_permanent_error(number: int) -> None:
    destination = FakeDestination(number)
    with pytest.raises(MoveError) as caught:
        run(destination)
    assert destination.handed_over == 1
    assert caught.value.errno == number
    assert explain(number).name in str(caught.value)


def test_move_is_retried_until_the_deadline_while_busy() -> None:
    destination = FakeDestination(errno.EBUSY)
    with pytest.raises(MoveError, match=r"EBUSY.*given up after \d+ attempts"):
        run(destination, deadline=1.0)
    assert destination.handed_over > 2


def test_full_cgroup_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    full = misc_cgroup.FullCgroup("/guests", "sev", 5, 5)
    monkeypatch.setattr(misc_cgroup, "find_full", lambda pid: full)
    with pytest.raises(MoveError, match=r"cgroup /guests: sev 5 of 5 in use; raise misc\.max"):
        run(FakeDestination(errno.EBUSY), deadline=0.02)


def test_errors_are_transient_only_if_busy_or_interrupted() -> None:
    assert {n for n, row in ERRNOS.items() if row.retry} == {errno.EBUSY, errno.EINTR}


@pytest.fixture
def cgroups(tmp_path: Path) -> Path:
    """A cgroup tree with a guest's cgroup two levels down, and /proc for process 7 in it."""
    inner = tmp_path / "cgroup" / "machine.slice" / "guest.scope"
    inner.mkdir(parents=True)
    (tmp_path / "proc" / "7").mkdir(parents=True)
    (tmp_path / "proc" / "7" / "cgroup").write_text("0::/machine.slice/guest.scope\n")
    (tmp_path / "cgroup" / "misc.capacity").write_text("sev 10\nsev_es 4\n")
    (tmp_path / "cgroup" / "misc.current").write_text("sev 3\nsev_es 0\n")
    (inner / "misc.max").write_text("sev max\nsev_es max\n")
    (inner / "misc.current").write_text("sev 3\nsev_es 0\n")
    return tmp_path


def find(tree: Path) -> misc_cgroup.FullCgroup | None:
    return misc_cgroup.find_full(7, tree / "cgroup", tree / "proc")


def test_cgroup_is_not_full_below_its_limit(cgroups: Path) -> None:
    assert find(cgroups) is None


def test_cgroup_is_full_at_the_limit_of_a_parent(cgroups: Path) -> None:
    slice_ = cgroups / "cgroup" / "machine.slice"
    (slice_ / "misc.max").write_text("sev 3\nsev_es max\n")
    (slice_ / "misc.current").write_text("sev 3\nsev_es 0\n")
    assert find(cgroups) == misc_cgroup.FullCgroup("/machine.slice", "sev", 3, 3)


def test_cgroup_is_full_at_the_capacity_of_the_machine(cgroups: Path) -> None:
    (cgroups / "cgroup" / "misc.current").write_text("sev 3\nsev_es 4\n")
    assert find(cgroups) == misc_cgroup.FullCgroup("/", "sev_es", 4, 4)


def test_cgroup_is_not_full_without_the_controller(tmp_path: Path) -> None:
    assert find(tmp_path) is None
