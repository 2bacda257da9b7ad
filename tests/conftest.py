"""What all tests share: the kinds of test, and the accelerator that this machine really has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from faults.table import FaultTable
from guests import counter, emulators
from guests.build import Unavailable
from guests.machine import Accelerator, Machine
from guests.running import Guest, GuestFailed

TESTS = Path(__file__).parent


_FAULTS = pytest.StashKey[FaultTable]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", type=Path, metavar="FILE", help="write what became of the guests after faults")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FAULTS] = FaultTable()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if file := session.config.getoption("--fault-table"):
        session.config.stash[_FAULTS].write(file)


@pytest.fixture(scope="session")
def fault_table(request: pytest.FixtureRequest) -> FaultTable:
    """Where tests of faults note what they have seen."""
    return request.config.stash[_FAULTS]


def some_of(points: Sequence[str]) -> list[Any]:
    """Every third point; the rest of the table of faults takes long, and runs when it is asked for by its marker."""
    rest = pytest.mark.faults
    return [pytest.param(point, marks=[rest] if number % 3 else []) for number, point in enumerate(points)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests by the directory that they lie in: ``qemu``, ``lab``, ``libvirt``."""
    for item in items:
        kind = item.path.relative_to(TESTS).parts[0]
        if kind in ("qemu", "lab", "libvirt"):
            item.add_marker(kind)
    if "faults" not in config.option.markexpr:
        rest = [item for item in items if item.get_closest_marker("faults")]
        config.hook.pytest_deselected(items=rest)
        items[:] = [item for item in items if item not in set(rest)]


@pytest.fixture(scope="session")
def accelerator(tmp_path_factory: pytest.TempPathFactory) -> Accelerator:
    """``kvm`` if a guest really runs under it (/dev/kvm may exist and be of no use), else ``tcg``."""
    try:
        machine = Machine(tmp_path_factory.mktemp("kvm"), accelerator="kvm", bios=counter.firmware())
        with Guest.start(machine, emulators.installed()) as guest:
            guest.wait_for_ticks(3, timeout=10)
    except (GuestFailed, Unavailable):
        return "tcg"
    return "kvm"
