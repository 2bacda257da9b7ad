"""
Tests in the SEV lab (tools/lab).

Tests in the directories below this one run *in* the lab, once for each kernel: pytest starts the lab at the first of
them, in it another pytest runs all that were selected, and the reports come back as if they had been made here. In
the lab itself, or on a host with SEV whose SEVHOP_LAB is set to a kernel's name, they run as any other test.

Tests in this directory run here.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
from lab.sevlab import kernels, selftests
from lab.sevlab.errors import LabError

from tests.support.guests import emulators, linux
from tests.support.guests.build import Unavailable

from .remote import Remote

HERE = Path(__file__).parent
KERNELS = ("6.1", "6.12")
#: A further kernel, on request (marker "long"), for tests in these directories.
NEWEST = "sid"
ON_NEWEST = HERE / "contract", HERE / "qemu"
#: Tests in this directory run in a lab that keeps the memory of guests encrypted, on the first kernel only.
ENCRYPTED = HERE / "encrypted"
#: Tests in this directory run in a lab with SELinux, on the second one only.
WITH_SELINUX = HERE / "selinux"
#: Options of such labs.
OPTIONS = {ENCRYPTED: "--encrypt", WITH_SELINUX: "--selinux"}
#: Kernels of those tests.
ONLY_KERNELS = {ENCRYPTED: KERNELS[:1], WITH_SELINUX: KERNELS[1:]}
#: Tests for which programs are built first.
SELFTESTS = "test_selftests.py"
INSIDE = os.environ.get("SEVHOP_LAB")

#: Which lab a test runs in: the kernel, and a further option of the lab.
Lab = tuple[str, str]
_remotes = pytest.StashKey[dict[Lab, Remote]]()


def _runs_in_lab(path: Path) -> bool:
    return HERE in path.parent.parents


@pytest.fixture(autouse=True)
def kernel(request: pytest.FixtureRequest) -> str:
    """The series of the kernel that the test runs on."""
    return str(getattr(request, "param", ""))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    path = metafunc.definition.path
    if not _runs_in_lab(path):
        return
    if INSIDE:
        # The pytest outside has selected, by the marker, too.
        wanted = [INSIDE]
    else:
        special = next((directory for directory in OPTIONS if directory in path.parents), None)
        wanted = [*(KERNELS if special is None else ONLY_KERNELS[special])]
        if any(directory in path.parents for directory in ON_NEWEST):
            wanted.append(NEWEST)
    mark = metafunc.definition.get_closest_marker("one_kernel")
    # Whoever starts pytest in a lab, or on a host with SEV, has chosen the kernel.
    by_default = [INSIDE] if INSIDE and Remote.REPORTS not in os.environ else [*(mark.args if mark else KERNELS)]
    marked = [pytest.param(one, marks=[] if one in by_default else [pytest.mark.long]) for one in wanted]
    metafunc.parametrize("kernel", marked, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Labs with an option come last. They start when another one has ended, and no test is to wait for that."""
    items.sort(key=lambda item: _runs_in_lab(item.path) and bool(_lab_of(item)[1]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Instead of running a test here, have it run in the lab and report what came of it."""
    if INSIDE or not _runs_in_lab(item.path):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _remote_of(item).reports(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _remote_of(item: pytest.Item) -> Remote:
    """The lab that the item runs in. From the first call all labs that are needed run, as many at once as fit."""
    stash = item.session.stash
    if _remotes not in stash:
        selected: dict[Lab, list[str]] = {}
        for other in item.session.items:
            if _runs_in_lab(other.path) and HERE in other.path.parents:
                selected.setdefault(_lab_of(other), []).append(other.nodeid)
        _fetch()
        _build_selftests({lab[0] for lab, tests in selected.items() if any(SELFTESTS in test for test in tests)})
        stash[_remotes] = {lab: Remote(item.config, *lab, tests) for lab, tests in selected.items()}
    return stash[_remotes][_lab_of(item)]


def _fetch() -> None:
    """There is no network in the lab, so what tests there need of Debian releases is fetched here."""
    for label in (emulators.OLD, emulators.NEW, emulators.UNSTABLE):
        with contextlib.suppress(Unavailable):  # the test that needs it will say so
            emulators.emulator(label)
    with contextlib.suppress(Unavailable):
        linux.images()


def _build_selftests(series: set[str]) -> None:
    """As there are no packages to be had in the lab."""
    for one in series & kernels.SERIES.keys():
        with contextlib.suppress(LabError):
            selftests.programs(one)


def _lab_of(item: pytest.Item) -> Lab:
    assert isinstance(item, pytest.Function)
    option = next((option for directory, option in OPTIONS.items() if directory in item.path.parents), "")
    return str(item.callspec.params["kernel"]), option


def pytest_sessionfinish(session: pytest.Session) -> None:
    for remote in session.stash.get(_remotes, {}).values():
        remote.end()


class _Reporter:
    """In the lab, for the pytest outside: sends it the reports, each a line with a mark and JSON."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        writer = self._config.get_terminal_writer()
        writer.line(f"{Remote.MARK}{json.dumps(data)}")
        writer.flush()


def pytest_configure(config: pytest.Config) -> None:
    if Remote.REPORTS in os.environ:
        config.pluginmanager.register(_Reporter(config))
