"""Checks of a guest: which guests are refused, and that every refusal has a hint."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from sevhop.checks.guest import _blockers, _context, _disks, _machine_type, _state, _user_networks
from sevhop.checks.registers import Registers
from sevhop.checks.result import CheckResult, Status, failed, passed
from sevhop.disks.block_graph import BlockGraph
from sevhop.guest.emulator import Emulator
from sevhop.guest.inspection import SevContext
from sevhop_qmp.process import QemuProcess

from .inspected_guest import guest


@pytest.fixture
def ourselves() -> Iterator[QemuProcess]:
    process = QemuProcess.open(os.getpid())
    yield process
    process.close()


def test_context_fails_of_snp(ourselves: QemuProcess) -> None:
    result = _context(guest(context=SevContext("sev-snp")), ourselves, Registers(), [], own_group=None, sandbox=False)
    assert result.status is Status.FAIL
    assert result.hint
    assert {child.status for child in result.children} == {Status.SKIP}


def test_context_of_sev_es_has_a_test_of_its_registers(ourselves: QemuProcess) -> None:
    for found in (passed("registers", "fine"), failed("registers", "lost", "hint")):
        es = guest(context=SevContext("sev-es"))
        result = _context(es, ourselves, Registers(found), [], own_group=None, sandbox=False)
        assert (result.status, result.detail) == (Status.PASS, "sev-es, policy 0x0")
        assert result.children[-1] is found


def test_host_is_not_tested_without_a_context(ourselves: QemuProcess) -> None:
    result = _context(guest(), ourselves, Registers(), [], own_group=None, sandbox=False)
    assert (result.status, result.children) == (Status.PASS, [])


def test_machine_type_fails_if_the_new_qemu_lacks_it() -> None:
    new = Emulator("/usr/bin/qemu", "12.0.0", frozenset({"pc-q35-12.0", "q35"}))
    result = _machine_type(new, guest().machine_type)
    assert result.status is Status.FAIL
    assert result.detail == "QEMU 12.0.0 has no pc-q35-7.2"
    assert result.hint
    assert _machine_type(new, "q35").status is Status.PASS


@pytest.mark.parametrize(
    ("was", "new", "status"),
    [
        ("10.0.13", "7.2.22", Status.FAIL),
        ("8.2.0", "8.1.5", Status.FAIL),
        ("10.0.13", "8.2.0", Status.PASS),
        ("7.2.22", "10.0.13", Status.PASS),
        ("7.2.22", "7.2.22", Status.PASS),
    ],
)
def test_user_networks_fail_if_the_new_qemu_does_not_number_them(was: str, new: str, status: Status) -> None:
    result = _user_networks(Emulator("/usr/bin/qemu", new, frozenset()), guest(version=was, user_networks=2))
    assert result.status is status
    assert bool(result.hint) == (status is Status.FAIL)


def test_blockers_ignore_only_sevs_own() -> None:
    sev = "SEV: Migration is not implemented"
    assert _blockers(guest(blockers=(sev,))).status is Status.PASS
    result = _blockers(guest(blockers=(sev, "non-migratable device: 0000:00:03.0/nvme")))
    assert result.status is Status.FAIL
    assert sev not in result.detail


@pytest.mark.parametrize("state", ["prelaunch", "shutdown", "inmigrate", "guest-panicked", "io-error", "suspended"])
def test_state_fails_unless_running_or_paused(state: str) -> None:
    assert _state(guest(state=state)).status is Status.FAIL


def test_hint_for_a_guest_that_was_started_paused_is_to_resume_it() -> None:
    """libvirt calls it paused, as a guest that can hop."""
    assert _state(guest(state="prelaunch")).hint == "resume it: it was started paused, and has not run yet"


def test_hint_for_a_deleted_image_has_what_is_to_be_done_with_a_medium() -> None:
    """Nobody copies an ISO of which the guest has no more use."""
    result = _disks(BlockGraph({}, {}, ()), ["disk sata0-0-0: /images/debian.iso"])
    assert result.status is Status.FAIL
    assert "virsh change-media --eject" in result.hint


def test_tree_skips_children_of_a_failure() -> None:
    tree = passed("root", "", failed("memory", "private", "share it", skipped=("size",)), passed("state"))
    assert [(depth, f.name, f.status.value) for depth, f in tree.walk()] == [
        (0, "root", "pass"),
        (1, "memory", "fail"),
        (2, "size", "skip"),
        (1, "state", "pass"),
    ]
    assert tree.failures() == [tree.children[0]]


def test_json_has_the_whole_tree() -> None:
    tree: CheckResult = passed("root", "x", failed("a", "b", "c", restart=True))
    assert tree.as_json() == {
        "name": "root",
        "status": "pass",
        "detail": "x",
        "hint": "",
        "restart_required": False,
        "children": [
            {"name": "a", "status": "fail", "detail": "b", "hint": "c", "restart_required": True, "children": []}
        ],
    }
