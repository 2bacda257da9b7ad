"""What may be done in each state of a keeper."""

from __future__ import annotations

import pytest
from sevhop.keeper.state import (
    FINISHED,
    KEEPER_NEEDED,
    RAN,
    SOURCE_GONE,
    Attempt,
    Facts,
    HookAction,
    State,
    after_destination_exit,
    at_hook,
    exits_with_command,
    reason_against_commit,
    reason_against_namesake,
    reason_against_restore,
    reason_against_start,
)

IMAGE = "/run/sevhop/image"
SUSPENDED = f"cannot start the domain: the guest is suspended in the keeper; run: virsh restore {IMAGE}"


@pytest.mark.parametrize("state", State)
def test_keeper_exits_with_its_command_unless_it_is_needed(state: State) -> None:
    assert exits_with_command(state) == (state not in KEEPER_NEEDED)
    assert (state in FINISHED) <= (state in SOURCE_GONE)


@pytest.mark.parametrize("state", State)
def test_restore_needs_a_saved_guest_that_has_not_run(state: State) -> None:
    possible = state in (State.WAITING, State.RESTORING, State.COMMITTED)
    assert bool(reason_against_restore(state, has_run=False)) == (not possible)
    if possible:
        assert reason_against_restore(state, has_run=True).startswith(f"cannot restore the guest: {RAN}; ")


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("step", ["prepare begin", "prepare cold-start", "migrate begin"])
def test_cold_start_is_refused_until_the_guest_runs_again(state: State, step: str) -> None:
    operation, sub = step.split(" ")
    restored = step == "prepare begin" and state in (State.RESTORING, State.COMMITTED)
    expected = "" if restored or state in FINISHED else SUSPENDED
    assert reason_against_start(state, operation, sub, IMAGE) == expected


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("step", ["restore begin", "started begin", "stopped end", "release end", "reconnect begin"])
def test_hook_steps_besides_prepare_are_no_cold_start(state: State, step: str) -> None:
    operation, sub = step.split(" ")
    assert reason_against_start(state, operation, sub, IMAGE) == ""


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("committing", [False, True])
def test_commit_happens_once_and_only_in_a_restore(state: State, committing: bool) -> None:
    reason = reason_against_commit(state, has_run=False, committing=committing)
    assert bool(reason) == (state is not State.RESTORING or committing)
    assert not reason or f'"{state.value}"' in reason
    ran = reason_against_commit(state, has_run=True, committing=committing)
    assert ran.startswith(f"cannot start the guest: {RAN}; ")


@pytest.mark.parametrize("state", State)
def test_namesake_is_refused_with_what_to_do(state: State) -> None:
    reason = reason_against_namesake(state, "prepare", "begin", "UUID", IMAGE)
    if state is State.OVER:
        assert reason == ""
    else:
        assert reason.endswith(f"virsh restore {IMAGE}" if state in SOURCE_GONE else "sevhop recover")
    assert reason_against_namesake(state, "started", "begin", "UUID", IMAGE) == ""


def test_guest_is_lost_with_the_destination_only_if_it_has_run() -> None:
    assert after_destination_exit(has_run=True) == (State.LOST, RAN)
    assert after_destination_exit(has_run=False)[0] is State.WAITING


def hooked(facts: Facts, step: str, *, own: bool = True) -> tuple[HookAction, str]:
    operation, sub = step.split(" ")
    return at_hook(facts, operation, sub, own=own, uuid="UUID", image=IMAGE)


@pytest.mark.parametrize("state", State)
def test_restore_begins_where_nothing_is_against_it(state: State) -> None:
    reason = reason_against_restore(state, has_run=False)
    expected = (HookAction.REFUSE, reason) if reason else (HookAction.BEGIN_RESTORE, "")
    assert hooked(Facts(state), "restore begin") == expected


@pytest.mark.parametrize(
    "facts",
    [Facts(State.RESTORING, committing=True), Facts(State.RESTORING, attempt=Attempt.IN_PROGRESS)],
    ids=["committing", "destination lives"],
)
def test_second_restore_is_refused_while_the_first_may_succeed(facts: Facts) -> None:
    action, reason = hooked(facts, "restore begin")
    assert action is HookAction.REFUSE
    assert "it is being restored already" in reason


@pytest.mark.parametrize("attempt", Attempt)
def test_guest_that_has_run_is_not_restored_whatever_lives(attempt: Attempt) -> None:
    facts = Facts(State.COMMITTED, has_run=True, attempt=attempt)
    action, reason = hooked(facts, "restore begin")
    assert action is HookAction.REFUSE
    assert RAN in reason


def test_orphan_does_not_prevent_a_restore() -> None:
    facts = Facts(State.RESTORING, attempt=Attempt.ORPHANED)
    assert hooked(facts, "restore begin") == (HookAction.BEGIN_RESTORE, "")


@pytest.mark.parametrize("state", State)
def test_another_image_is_never_restored(state: State) -> None:
    action, reason = hooked(Facts(state), "restore another")
    assert action is HookAction.REFUSE
    assert reason.endswith(f"virsh restore {IMAGE}") == (state in SOURCE_GONE - FINISHED)


@pytest.mark.parametrize("state", State)
def test_start_commits_only_in_a_restore(state: State) -> None:
    action, reason = hooked(Facts(state), "started begin")
    if state in FINISHED:
        assert action is HookAction.ALLOW
    else:
        assert action is (HookAction.COMMIT if state is State.RESTORING else HookAction.REFUSE)
    assert bool(reason) == (action is HookAction.REFUSE)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("step", ["stopped end", "release end", "reconnect begin", "attach begin", "start begin"])
def test_other_steps_are_allowed_in_every_state(state: State, step: str) -> None:
    assert hooked(Facts(state, has_run=True, committing=True), step) == (HookAction.ALLOW, "")


@pytest.mark.parametrize("state", State)
def test_other_domains_are_ignored_unless_they_take_the_name(state: State) -> None:
    assert hooked(Facts(state), "started begin", own=False) == (HookAction.IGNORE, "")
    taken = HookAction.IGNORE if state is State.OVER else HookAction.REFUSE
    assert hooked(Facts(state), "restore begin", own=False)[0] is taken
