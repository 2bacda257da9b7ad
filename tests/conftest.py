"""What all tests share: the kinds of test, and the accelerator that this machine really has."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, cast

import pytest

from tests.support.faults.table import Cell, FaultTable
from tests.support.guests import counter, emulators
from tests.support.guests.build import Unavailable
from tests.support.guests.isolation import isolate
from tests.support.guests.machine import Accelerator, Machine
from tests.support.guests.running import Guest, GuestFailed

TESTS = Path(__file__).parent


#: Notes the end of a guest: path, step, fault, and what it came to.
NoteFault = Callable[[str, str, str, Cell], None]

_FAULT = "fault"

#: Markers of tests that take long: they run if they are asked for.
ON_REQUEST = ("faults", "long")

#: A property of a test: what is to be reported in pytest's summary.
NOTED = "noted"


class _Faults:
    """Gathers what tests have noted from their reports, which may come from the lab."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._table = FaultTable()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            for name, noted in report.user_properties:
                if name == _FAULT:
                    path, step, fault, *cell = cast(list[Any], noted)
                    self._table.add(path, step, fault, Cell(*cell))

    def pytest_sessionfinish(self) -> None:
        self._table.write(self._file)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", type=Path, metavar="FILE", help="write what became of the guests after faults")
    parser.addoption("--virtqemud", action="store_true", help="run tests/libvirt with virtqemud instead of libvirtd")


def pytest_configure(config: pytest.Config) -> None:
    isolate()
    # As an interruption at the keyboard: fixtures end what they have started.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    os.umask(0o022)  # QEMUs that run as another user read what tests write
    if file := config.getoption("--fault-table"):
        config.pluginmanager.register(_Faults(file))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Report what tests have noted."""
    reports = [report for report in terminalreporter.stats.get("passed", []) if report.when == "call"]
    if lines := [str(noted) for report in reports for name, noted in report.user_properties if name == NOTED]:
        terminalreporter.section("noted")
        terminalreporter.write_line("\n".join(lines))


@pytest.fixture
def note_fault(record_property: Callable[[str, object], None]) -> NoteFault:
    """For tests of faults, to note what they have seen."""

    def note(path: str, step: str, fault: str, cell: Cell) -> None:
        record_property(_FAULT, [path, step, fault, *astuple(cell)])

    return note


def some_of(points: Iterable[str], every: int = 6) -> list[Any]:
    """Every sixth point, or so: a table of faults takes long, and the rest runs when it is asked for by its marker."""
    rest = pytest.mark.faults
    return [pytest.param(point, marks=[rest] if number % every else []) for number, point in enumerate(points)]


def each_once(first: Sequence[str], second: Sequence[str]) -> list[Any]:
    """All pairs of two equally long lists. By default each value is in one of them; the rest has the marker as well."""
    pairs = [(one, other, row != column) for row, one in enumerate(first) for column, other in enumerate(second)]
    return [pytest.param(one, other, marks=[pytest.mark.faults] if rest else []) for one, other, rest in pairs]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests by the directory that they lie in, such as ``qemu`` or ``lab``."""
    for item in items:
        kind = item.path.relative_to(TESTS).parts[0]
        if kind in ("qemu", "lab", "libvirt", "docs", "packaging", "systemd"):
            item.add_marker(kind)
    left_out = [name for name in ON_REQUEST if name not in config.option.markexpr]
    if rest := [item for item in items if any(map(item.get_closest_marker, left_out))]:
        config.hook.pytest_deselected(items=rest)
        items[:] = [item for item in items if item not in set(rest)]


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user reaches; pytest's own are for whoever runs it."""
    if os.geteuid():
        pytest.skip("other users can be played by root only")
    with tempfile.TemporaryDirectory(dir="/run", prefix="sevhop-test-") as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


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


@pytest.fixture(scope="session")
def emulator() -> Callable[[str], Path]:
    """The emulator of a version, such as ``emulators.OLD``; the test is skipped if it is not to be had."""

    missing: dict[str, str] = {}  # to try once, not once for each test

    def find(label: str) -> Path:
        if label not in missing:
            try:
                return emulators.emulator(label)
            except Unavailable as err:
                missing[label] = str(err)
        pytest.skip(f"no QEMU {label}: {missing[label]}")

    return find


@pytest.fixture(scope="session")
def old(emulator: Callable[[str], Path]) -> Path:
    """The older of the two QEMUs."""
    return emulator(emulators.OLD)


@pytest.fixture(scope="session")
def new(emulator: Callable[[str], Path]) -> Path:
    """The newer of the two QEMUs."""
    return emulator(emulators.NEW)


@pytest.fixture(scope="session")
def libvirt_of_ones_own() -> None:
    """For tests that start a libvirt daemon for themselves: it needs its programs, and a mount namespace."""
    missing = [name for name in ("libvirtd", "virsh", "qemu-img", "nsenter") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if os.geteuid() or subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("a mount namespace cannot be had here")
