"""The preflight: which guests are refused, and that every refusal says what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from sevhop.checks.guest import _blockers, _context, _machine_type, _state
from sevhop.checks.result import Finding, Status, failed, passed
from sevhop.guest.emulator import Emulator
from sevhop.guest.inspection import SevContext
from sevhop_qmp.process import QemuProcess

from .inspected_guest import guest


@pytest.fixture
def ourselves() -> Iterator[QemuProcess]:
    process = QemuProcess.open(os.getpid())
    yield process
    process.close()


@pytest.mark.parametrize("kind", ["sev-es", "sev-snp"])
def test_contexts_that_do_not_hop(kind: str, ourselves: QemuProcess) -> None:
    finding = _context(guest(context=SevContext(kind)), ourselves, own_group=None, sandbox=False)
    assert finding.status is Status.FAIL
    assert finding.remedy
    assert {child.status for child in finding.children} == {Status.SKIP}


def test_the_host_does_not_matter_without_a_context(ourselves: QemuProcess) -> None:
    finding = _context(guest(), ourselves, own_group=None, sandbox=False)
    assert (finding.status, finding.children) == (Status.PASS, [])


def test_machine_type_that_the_new_qemu_has_not() -> None:
    new = Emulator("/usr/bin/qemu", "12.0.0", frozenset({"pc-q35-12.0", "q35"}))
    finding = _machine_type(new, guest())
    assert finding.status is Status.FAIL
    assert finding.detail == "QEMU 12.0.0 has no pc-q35-7.2"
    assert finding.remedy
    assert _machine_type(new, guest(machine_type="q35")).status is Status.PASS


def test_only_sevs_own_blocker_is_ignored() -> None:
    sev = "SEV: Migration is not implemented"
    assert _blockers(guest(blockers=(sev,))).status is Status.PASS
    finding = _blockers(guest(blockers=(sev, "non-migratable device: 0000:00:03.0/nvme")))
    assert finding.status is Status.FAIL
    assert sev not in finding.detail


@pytest.mark.parametrize("state", ["prelaunch", "shutdown", "inmigrate", "guest-panicked", "io-error", "suspended"])
def test_states_in_which_a_guest_does_not_hop(state: str) -> None:
    assert _state(guest(state=state)).status is Status.FAIL


def test_children_of_a_failure_are_skipped_and_the_tree_is_walked() -> None:
    tree = passed("root", "", failed("memory", "private", "share it", skipped=("size",)), passed("state"))
    assert [(depth, f.name, f.status.value) for depth, f in tree.walk()] == [
        (0, "root", "pass"),
        (1, "memory", "fail"),
        (2, "size", "skip"),
        (1, "state", "pass"),
    ]
    assert tree.failures() == [tree.children[0]]


def test_json_has_the_whole_tree() -> None:
    tree: Finding = passed("root", "x", failed("a", "b", "c"))
    assert tree.as_json() == {
        "name": "root",
        "status": "pass",
        "detail": "x",
        "remedy": "",
        "children": [{"name": "a", "status": "fail", "detail": "b", "remedy": "c", "children": []}],
    }
