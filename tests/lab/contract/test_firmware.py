"""What the firmware of the security processor refuses, with the status codes of AMD's SEV API (publication 55766)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from . import kvm
from .kvm import kvm_sev_launch_measure, kvm_sev_launch_start, kvm_sev_launch_update_data
from .sev import POLICY_SEV, POLICY_SEV_ES, PROGRAM, SevVm, contexts

SUCCESS = 0x00
INVALID_GUEST_STATE = 0x02
INVALID_LENGTH = 0x04
POLICY_FAILURE = 0x07
INVALID_ASID = 0x0D
INVALID_GUEST = 0x10

POLICY_NODBG = 1
POLICY_NOKS = 2
#: An API that no firmware has.
POLICY_API_TOO_NEW = 0xFF << 24

MEASUREMENT_LENGTH = 48

# States of a guest.
LUPDATE, LSECRET = 1, 2


def status(vm: SevVm, number: int, argument: ctypes.Structure | None = None) -> int:
    return kvm.firmware_status(vm.descriptor, vm.device, number, argument)


def start(vm: SevVm, policy: int = POLICY_SEV, shared_with: int = 0) -> int:
    return status(vm, kvm.KVM_SEV_LAUNCH_START, kvm_sev_launch_start(policy=policy, handle=shared_with))


def update_data(vm: SevVm, length: int = 0x1000, offset: int = 0) -> int:
    data = kvm_sev_launch_update_data(uaddr=vm.memory.address + PROGRAM + offset, len=length)
    return status(vm, kvm.KVM_SEV_LAUNCH_UPDATE_DATA, data)


def measure(vm: SevVm, length: int = MEASUREMENT_LENGTH) -> tuple[int, int]:
    """The status, and the length of the measurement."""
    buffer = ctypes.create_string_buffer(0x100)
    argument = kvm_sev_launch_measure(uaddr=ctypes.addressof(buffer), len=length)
    return status(vm, kvm.KVM_SEV_LAUNCH_MEASURE, argument), int(argument.len)


def finish(vm: SevVm) -> int:
    return status(vm, kvm.KVM_SEV_LAUNCH_FINISH)


@pytest.fixture
def vm() -> Iterator[SevVm]:
    """Not launched."""
    with SevVm() as vm:
        yield vm


@pytest.fixture
def launching(vm: SevVm) -> SevVm:
    """Behind LAUNCH_START."""
    assert start(vm) == SUCCESS
    return vm


@pytest.fixture
def measured(launching: SevVm) -> SevVm:
    """Behind LAUNCH_MEASURE."""
    assert update_data(launching) == SUCCESS
    assert measure(launching) == (SUCCESS, MEASUREMENT_LENGTH)
    return launching


def states() -> list[int]:
    return [context.state for context in contexts()]


@pytest.mark.parametrize("es", [False, True])
def test_policy_must_fit_the_asid(es: bool) -> None:
    """Those below a limit are for SEV-ES guests, the others for other guests. The guest is no guest any more."""
    with SevVm(es=es) as vm:
        assert start(vm, POLICY_SEV if es else POLICY_SEV_ES) == INVALID_ASID
        assert contexts() == []
        assert start(vm, POLICY_SEV_ES if es else POLICY_SEV) == SUCCESS


def test_policy_of_a_newer_api_is_refused(vm: SevVm) -> None:
    assert start(vm, POLICY_API_TOO_NEW) == POLICY_FAILURE
    assert contexts() == []


def test_key_is_not_shared_with_an_unknown_guest(vm: SevVm) -> None:
    assert start(vm, shared_with=0x7FFFFFFF) == INVALID_GUEST


def test_key_is_shared_unless_the_policy_forbids_it(vm: SevVm) -> None:
    with SevVm() as owner, SevVm() as secretive:
        assert start(owner) == SUCCESS
        assert start(secretive, POLICY_NOKS) == SUCCESS
        handles = {context.policy: context.handle for context in contexts()}
        assert start(vm, POLICY_NOKS, handles[POLICY_NOKS]) == POLICY_FAILURE
        assert start(vm, POLICY_SEV, handles[POLICY_SEV]) == SUCCESS


def test_launch_goes_through_its_states(launching: SevVm) -> None:
    assert states() == [LUPDATE]
    assert update_data(launching) == SUCCESS
    assert contexts()[0].bytes == 0x1000
    assert measure(launching) == (SUCCESS, MEASUREMENT_LENGTH)
    assert states() == [LSECRET]
    assert finish(launching) == SUCCESS


def test_launch_is_not_finished_before_it_is_measured(launching: SevVm) -> None:
    assert finish(launching) == INVALID_GUEST_STATE
    assert states() == [LUPDATE]


def test_nothing_is_added_or_measured_after_the_measurement(measured: SevVm) -> None:
    assert update_data(measured) == INVALID_GUEST_STATE
    assert measure(measured)[0] == INVALID_GUEST_STATE
    assert (states(), contexts()[0].bytes) == ([LSECRET], 0x1000)


def test_launch_is_not_finished_twice(measured: SevVm) -> None:
    assert finish(measured) == SUCCESS
    assert finish(measured) == INVALID_GUEST_STATE


def test_length_of_the_measurement_can_be_asked_for(launching: SevVm) -> None:
    assert measure(launching, 0) == (INVALID_LENGTH, MEASUREMENT_LENGTH)
    assert measure(launching, MEASUREMENT_LENGTH - 1)[0] == INVALID_LENGTH
    assert states() == [LUPDATE]


def test_data_is_added_in_blocks(launching: SevVm) -> None:
    assert update_data(launching, length=0x18) == INVALID_LENGTH
    assert contexts()[0].bytes == 0


@pytest.mark.parametrize("number", [kvm.KVM_SEV_DBG_DECRYPT, kvm.KVM_SEV_DBG_ENCRYPT])
def test_guest_is_debugged_unless_the_policy_forbids_it(number: int, vm: SevVm) -> None:
    with SevVm.launched() as open_guest:
        buffer = ctypes.create_string_buffer(0x2000)
        page = -(-ctypes.addressof(buffer) // 0x1000) * 0x1000
        for guest, policy, expected in ((open_guest, None, SUCCESS), (vm, POLICY_NODBG, POLICY_FAILURE)):
            if policy is not None:
                assert start(guest, policy) == SUCCESS
            memory = guest.memory.address + PROGRAM
            source, target = (memory, page) if number == kvm.KVM_SEV_DBG_DECRYPT else (page, memory)
            debug = kvm.kvm_sev_dbg(src_uaddr=source, dst_uaddr=target, len=0x10)
            assert status(guest, number, debug) == expected
