"""What the firmware of the security processor refuses, with the status codes of AMD's SEV API (publication 55766)."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator

import pytest

from . import kvm
from .kvm import kvm_sev_launch_measure, kvm_sev_launch_secret, kvm_sev_launch_start, kvm_sev_launch_update_data
from .owner import authenticated, keys, packet_of, word
from .sev import POLICY_SEV, POLICY_SEV_ES, PROGRAM, SevVm, contexts, execute

SUCCESS = 0x00
INVALID_GUEST_STATE = 0x02
INVALID_LENGTH = 0x04
POLICY_FAILURE = 0x07
BAD_MEASUREMENT = 0x0B
INVALID_ASID = 0x0D
WBINVD_REQUIRED = 0x0E
INVALID_COMMAND = 0x11
UNSUPPORTED = 0x15
INVALID_GUEST = 0x10

POLICY_NODBG = 1
POLICY_NOKS = 2
#: An API that no firmware has.
POLICY_API_TOO_NEW = 0xFF << 24

MEASUREMENT_LENGTH = 48
REPORT_LENGTH = 0xD0

# Commands.
PEK_GEN = 0x05
DF_FLUSH = 0x0A
SWAP_IN = 0x71
#: Major, minor and build of the API, as the kernel reports when it loads the driver.
API = bytes([1, 55, 8])
#: How many ASIDs are for SEV-ES guests.
ASIDS_FOR_SEV_ES = 99

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


def measurement(vm: SevVm) -> tuple[bytes, bytes]:
    """Measure the guest. The measurement, and its nonce."""
    buffer = ctypes.create_string_buffer(MEASUREMENT_LENGTH)
    vm.sev(kvm.KVM_SEV_LAUNCH_MEASURE, kvm_sev_launch_measure(uaddr=ctypes.addressof(buffer), len=len(buffer)))
    return buffer.raw[:32], buffer.raw[32:]


def inject(vm: SevVm, header: bytes, packet: bytes, length: int) -> int:
    """Inject a secret into the memory at PROGRAM."""
    buffers = ctypes.create_string_buffer(header, len(header)), ctypes.create_string_buffer(packet, len(packet))
    argument = kvm_sev_launch_secret(
        hdr_uaddr=ctypes.addressof(buffers[0]),
        hdr_len=len(header),
        guest_uaddr=vm.memory.address + PROGRAM,
        guest_len=length,
        trans_uaddr=ctypes.addressof(buffers[1]),
        trans_len=len(packet),
    )
    return status(vm, kvm.KVM_SEV_LAUNCH_SECRET, argument)


def decrypted(vm: SevVm, length: int) -> bytes:
    """The guest's memory at PROGRAM, as its debugger sees it."""
    buffer = ctypes.create_string_buffer(0x2000)
    page = -(-ctypes.addressof(buffer) // 0x1000) * 0x1000
    vm.sev(kvm.KVM_SEV_DBG_DECRYPT, kvm.kvm_sev_dbg(src_uaddr=vm.memory.address + PROGRAM, dst_uaddr=page, len=length))
    return ctypes.string_at(page, length)


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


def test_measurement_is_of_what_was_added_in_its_order(launching: SevVm) -> None:
    for page in (1, 0):
        start = PROGRAM + page * 0x1000
        launching.memory.map[start : start + 0x1000] = bytes([0xA0 + page]) * 0x1000
        assert update_data(launching, offset=page * 0x1000) == SUCCESS
    measured, nonce = measurement(launching)
    digest = hashlib.sha256(b"\xa1" * 0x1000 + b"\xa0" * 0x1000).digest()
    assert measured == authenticated(b"\x04", API, word(POLICY_SEV), digest, nonce)


def test_nonce_and_keys_are_new_for_each_guest() -> None:
    seen = set()
    for _ in range(2):
        with SevVm() as vm:
            assert start(vm) == SUCCESS
            seen.update([measurement(vm)[1], *keys()])
    assert len(seen) == 6


def test_report_has_nonce_digest_and_policy(launching: SevVm) -> None:
    launching.memory.map[PROGRAM : PROGRAM + 0x1000] = bytes(range(256)) * 16
    assert update_data(launching) == SUCCESS
    buffer, nonce = ctypes.create_string_buffer(REPORT_LENGTH), bytes(range(16))
    launching.sev(
        kvm.KVM_SEV_GET_ATTESTATION_REPORT,
        kvm.kvm_sev_attestation_report(mnonce=tuple(nonce), uaddr=ctypes.addressof(buffer), len=REPORT_LENGTH),
    )
    digest = hashlib.sha256(bytes(range(256)) * 16).digest()
    assert buffer.raw.startswith(nonce + digest + word(POLICY_SEV))


def test_secret_is_in_the_guest_once_it_is_injected(launching: SevVm) -> None:
    secret = b"a secret in three blocks of sixteen bytes each. "
    assert inject(launching, *packet_of(secret, bytes(32)), len(secret)) == INVALID_GUEST_STATE
    header, encrypted = packet_of(secret, measurement(launching)[0])
    assert inject(launching, header, encrypted, len(secret)) == SUCCESS
    assert decrypted(launching, len(secret)) == secret
    assert finish(launching) == SUCCESS


@pytest.mark.parametrize("changed", ["flags", "IV", "MAC", "secret", "measurement"])
def test_secret_is_refused_unless_it_is_from_the_owner_of_this_guest(changed: str, launching: SevVm) -> None:
    assert update_data(launching) == SUCCESS
    measured = measurement(launching)[0]
    header, encrypted = packet_of(bytes(16), bytes(32) if changed == "measurement" else measured)
    place = {"flags": 0, "IV": 4, "MAC": 20}.get(changed)
    if place is not None:
        header = header[:place] + bytes([header[place] ^ 1]) + header[place + 1 :]
    if changed == "secret":
        encrypted = bytes([encrypted[0] ^ 1]) + encrypted[1:]
    before = decrypted(launching, 16)
    assert inject(launching, header, encrypted, 16) == BAD_MEASUREMENT
    assert decrypted(launching, 16) == before


@pytest.mark.parametrize("command", [PEK_GEN, SWAP_IN])
def test_commands_that_the_lab_lacks_are_not_unknown_ones(command: int) -> None:
    assert execute(command) == UNSUPPORTED
    assert execute(SWAP_IN + 1) == INVALID_COMMAND


def test_caches_must_be_written_back_after_a_guest_has_left_its_asid() -> None:
    """The kernel itself does so before it uses an ASID again."""
    with SevVm.launched():
        pass
    assert execute(DF_FLUSH) == WBINVD_REQUIRED


def test_asids_are_used_again() -> None:
    """No guest has an ASID that is not flushed: the kernel has all caches written back when it runs out of ASIDs."""
    seen: set[int] = set()
    for _ in range(ASIDS_FOR_SEV_ES + 1):
        with SevVm(es=True, vcpus=0) as vm:
            assert start(vm, POLICY_SEV_ES) == SUCCESS
            (asid,) = (context.asid for context in contexts())
            if asid in seen:
                return
            seen.add(asid)
    pytest.fail("there are more ASIDs than expected")
