"""What libvirt's hook is answered while a guest runs in the transit."""

from __future__ import annotations

import pytest
from sevhop.keeper.state import HookAction
from sevhop.keeper.transit_state import FINISHED, TransitState, at_hook

IMAGE = "/run/sevhop/image"
UUID = "11111111-2222-3333-4444-55555555550a"
STEPS = (
    "prepare begin",
    "prepare cold-start",
    "migrate begin",
    "restore begin",
    "restore another",
    "started begin",
    "reconnect begin",
)


def answer(
    state: TransitState, step: str, *, own: bool = True, restoring: bool = False, connected: bool = True
) -> tuple[HookAction, str]:
    operation, sub = step.split(" ")
    return at_hook(state, operation, sub, own=own, restoring=restoring, connected=connected, uuid=UUID, image=IMAGE)


@pytest.mark.parametrize("state", TransitState)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("restoring", [False, True])
def test_hook_never_commits(state: TransitState, step: str, restoring: bool) -> None:
    assert answer(state, step, restoring=restoring)[0] is not HookAction.COMMIT


@pytest.mark.parametrize("state", TransitState)
@pytest.mark.parametrize("step", ["prepare cold-start", "migrate begin", "restore another"])
def test_cold_start_is_refused_until_the_guest_is_elsewhere(state: TransitState, step: str) -> None:
    action, reason = answer(state, step)
    assert action is (HookAction.ALLOW if state in FINISHED else HookAction.REFUSE)
    assert state in FINISHED or reason.endswith(f"virsh restore {IMAGE}")


@pytest.mark.parametrize("state", set(TransitState) - FINISHED)
def test_restore_begins_unless_one_is_in_progress(state: TransitState) -> None:
    assert answer(state, "restore begin") == (HookAction.BEGIN_RESTORE, "")
    assert answer(state, "restore begin", restoring=True)[0] is HookAction.REFUSE


@pytest.mark.parametrize("state", set(TransitState) - FINISHED)
@pytest.mark.parametrize("step", ["prepare begin", "started begin"])
def test_destination_is_started_only_in_a_restore(state: TransitState, step: str) -> None:
    expected = HookAction.ALLOW if state is TransitState.RESTORING else HookAction.REFUSE
    assert answer(state, step)[0] is expected


def test_qemu_that_does_not_ask_for_the_guest_is_not_started() -> None:
    """It was restored from another image, and runs what is in that."""
    action, reason = answer(TransitState.RESTORING, "started begin", connected=False)
    assert action is HookAction.REFUSE
    assert reason.endswith(f"virsh restore {IMAGE}")


@pytest.mark.parametrize("state", TransitState)
@pytest.mark.parametrize("step", STEPS)
def test_namesake_is_not_started(state: TransitState, step: str) -> None:
    starts = step not in ("started begin", "reconnect begin") and state not in FINISHED
    action, reason = answer(state, step, own=False)
    assert action is (HookAction.REFUSE if starts else HookAction.IGNORE)
    assert (UUID in reason) == starts


@pytest.mark.parametrize("state", TransitState)
def test_reconnect_is_never_refused(state: TransitState) -> None:
    """libvirt would kill the guest."""
    assert answer(state, "reconnect begin") == (HookAction.ALLOW, "")
