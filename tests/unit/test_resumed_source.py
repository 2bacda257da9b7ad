"""A source that is resumed in a rollback, while somebody else has begun something that stops it again."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from sevhop.engine import transfer


class Fake:
    """The monitor of a source, the hop, and what else a rollback asks."""

    def __init__(self, migration: str, dump: str) -> None:
        self.answers: dict[str, Any] = {
            "query-status": {"status": "running", "running": True},
            "query-migrate": {"status": migration} if migration else {},
            "query-dump": {"status": dump},
            "query-jobs": [],
            "cont": {},
        }
        self.name, self.timeout = "fake", 1.0
        self.executed: list[str] = []
        self.notes: list[str] = []
        self.downtime = SimpleNamespace(began=True)
        self.note = self.notes.append

    async def execute(self, command: str, arguments: object = None, *, timeout: float = 0) -> Any:
        self.executed.append(command)
        return self.answers[command]

    async def yes(self) -> bool:
        return True

    async def no(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("migration", "dump", "job"),
    [("", "none", ""), ("completed", "completed", ""), ("active", "none", "migration"), ("", "active", "memory dump")],
)
def test_job_that_found_a_paused_guest_is_reported(migration: str, dump: str, job: str) -> None:
    """As `virsh dump --live`, which libvirt's monitor allows between our commands: in the end the guest is paused."""
    fake: Any = Fake(migration, dump)
    checked: Any = SimpleNamespace(monitor=fake, watch=SimpleNamespace(stopped_by_us=fake.yes))
    prepared: Any = SimpleNamespace(
        disks=SimpleNamespace(spares_given_up=False), transfer=SimpleNamespace(abandon=fake.no)
    )
    boost: Any = SimpleNamespace(reset=lambda: None)
    asyncio.run(transfer._resume_stopped_source(fake, checked, prepared, boost))
    assert "cont" in fake.executed
    assert [job in note for note in fake.notes] == [True] * bool(job)
