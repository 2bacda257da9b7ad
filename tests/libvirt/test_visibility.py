"""Whoever asks about a guest that is not where libvirt has it learns that, and what to do; asking is harmless."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sevhop.observe import journald

from tests.support.guests.daemon import Daemon, DomainGuest
from tests.support.guests.running import wait_until

from .conftest import StartDomain
from .failing import another_hook
from .systemd_journal import journal
from .transit_guest import end_everything, kill_keeper_and_supervisor

NAME, NEIGHBOUR = "seen-away", "seen-at-home"
#: A file of metrics, and of calls of another hook.
METRICS, CALLS = "run/sevhop.prom", "run/hook-calls"
REFUSAL = "it may not start"
AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")
#: Anybody may connect to the daemon.
OPEN = 'auth_unix_rw = "none"\nunix_sock_rw_perms = "0777"\n'

Away = contextlib.AbstractContextManager[None]


@contextlib.contextmanager
def prepared(daemon: Daemon, guest: DomainGuest, new: Path) -> Iterator[None]:
    """By ``upgrade --prepare``."""
    report = daemon.upgrade(guest.name, "--emulator", new, "--prepare")
    assert (report["outcome"], report["in_transit"]) == ("prepared", True), report
    yield


@contextlib.contextmanager
def without_keeper(daemon: Daemon, guest: DomainGuest, new: Path) -> Iterator[None]:
    """The same, and then the keeper has died with its supervisor."""
    with prepared(daemon, guest, new):
        kill_keeper_and_supervisor(daemon)
        yield


@contextlib.contextmanager
def not_restored(daemon: Daemon, guest: DomainGuest, new: Path) -> Iterator[None]:
    """The upgrade has failed, and so has the way back: another hook refuses."""
    script = f'[ "$1 $2/$3" = "{guest.name} started/begin" ] || exit 0\necho {REFUSAL} >&2; exit 1'
    with another_hook(daemon, script):
        report = daemon.upgrade(guest.name, "--emulator", new)
        assert (report["outcome"], report["status"]) == ("recovery-required", 4), report
        assert REFUSAL in report["reason"]
        yield


@contextlib.contextmanager
def suspended(daemon: Daemon, guest: DomainGuest, new: Path) -> Iterator[None]:
    """Prepared without a transit."""
    report = daemon.upgrade(guest.name, "--emulator", new, "--no-transit", "--no-rehearsal", "--prepare")
    assert (report["outcome"], report["in_transit"]) == ("prepared", False), report
    yield


#: How a guest gets away: where it is then, and a part of the line of ``status``.
WAYS: dict[str, tuple[Callable[[Daemon, DomainGuest, Path], Away], str, str]] = {
    "prepared": (prepared, "transit", "the guest runs in the transit"),
    "without its keeper": (without_keeper, "transit", "without a keeper"),
    "not restored": (not_restored, "transit", REFUSAL),
    "suspended": (suspended, "keeper", "the guest is suspended in the keeper"),
}


@pytest.fixture
def guest(daemon: Daemon, start: StartDomain) -> Iterator[DomainGuest]:
    """One that counts, beside one that stays at home. Nothing of it is left, also if it was not recovered."""
    start(name=NEIGHBOUR)
    guest = start(name=NAME)
    guest.wait_for_ticks()
    try:
        yield guest
    finally:
        (daemon.root / METRICS).unlink(missing_ok=True)
        if daemon.left_over():
            end_everything(daemon, NAME)


def rows(daemon: Daemon) -> dict[str, dict[str, Any]]:
    """What ``status --json`` has of each domain."""
    return {row["name"]: row for row in json.loads(daemon.sevhop("status", "--json").stdout)["domains"]}


def gauges(daemon: Daemon) -> dict[str, float]:
    """Metrics of the domains, as they are now."""
    daemon.sevhop("status", "--metrics-dir", "/run")
    lines = (daemon.root / METRICS).read_text().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def assert_at_home(daemon: Daemon, guest: DomainGuest) -> None:
    """Whoever asks finds nothing unusual."""
    assert daemon.sevhop("status").returncode == 0
    found = rows(daemon)[guest.name]
    assert (found["place"], found["attended"], found["elsewhere_s"], found["operation"]) == ("domain", True, None, "")
    values = gauges(daemon)
    assert values['sevhop_guests{place="domain"}'] == 2
    assert (values["sevhop_unattended_guests"], values["sevhop_elsewhere_seconds"]) == (0, 0)


@pytest.mark.parametrize(
    "way",
    [
        *("not restored", "suspended"),
        *(pytest.param(way, marks=pytest.mark.faults) for way in ("prepared", "without its keeper")),
    ],
)
def test_guest_that_is_not_where_libvirt_has_it_is_seen_by_every_command(
    daemon: Daemon, guest: DomainGuest, new: Path, way: str
) -> None:
    begin, place, text = WAYS[way]
    assert_at_home(daemon, guest)
    with begin(daemon, guest, new):
        assert guest.state == "shut off"
        for words in (["status"], ["status", guest.name]):
            done = daemon.sevhop(*words)
            (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{guest.name}: ")]
            assert (done.returncode, text in line, done.stderr) == (4, True, ""), done
        found = rows(daemon)
        assert (found[NAME]["place"], found[NAME]["attended"]) == (place, False)
        assert text in found[NAME]["operation"]
        hint = f"sevhop recover {guest.name}"
        assert hint in found[NAME]["hint"]
        assert found[NAME]["elsewhere_s"] > 0
        assert (found[NEIGHBOUR]["place"], found[NEIGHBOUR]["attended"]) == ("domain", True)
        values = gauges(daemon)
        assert (values[f'sevhop_guests{{place="{place}"}}'], values['sevhop_guests{place="domain"}']) == (1, 1)
        assert values["sevhop_unattended_guests"] == 1
        assert values["sevhop_elsewhere_seconds"] >= found[NAME]["elsewhere_s"]
        done = daemon.sevhop("check", guest.name)
        assert (done.returncode, hint in done.stderr, "start it" in done.stderr) == (1, True, False), done
        assert hint in json.loads(daemon.sevhop("check", guest.name, "--json").stdout)["reason"]
        for rule in ("--all", "--outdated"):
            done = daemon.sevhop("upgrade", rule, "--exclude", NEIGHBOUR, "--dry-run", "--json")
            (report,) = json.loads(done.stdout)["domains"]
            assert (done.returncode, report["outcome"], hint in report["reason"]) == (1, "refused", True), done
    assert daemon.sevhop("recover", guest.name).returncode == 0
    assert_at_home(daemon, guest)
    guest.wait_for_ticks()
    wait_until(lambda: daemon.left_over() == [], 30, "nothing is left")


def records_of(daemon: Daemon, *words: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, str]]]:
    """What a command prints, and what systemd's journal has of recoveries in it."""
    with journal(daemon) as records:
        done = daemon.sevhop(*words)
    fields = [dict(line.split("=", 1) for line in record.splitlines() if "=" in line) for record in records]
    return done, [one for one in fields if one.get("MESSAGE_ID") == journald.RECOVERY]


def test_journald_has_the_recoveries_of_a_guest(daemon: Daemon, guest: DomainGuest, new: Path) -> None:
    """One that has failed with its reason, also one of the timer; and one that has succeeded."""
    with not_restored(daemon, guest, new):
        for words in (["recover", guest.name], ["recover", guest.name, "--json"]):
            done, (record,) = records_of(daemon, *words)
            assert (done.returncode, REFUSAL in done.stdout) == (4, True), done
            assert (record["SEVHOP_GUEST"], record["SEVHOP_RESULT"], record["PRIORITY"]) == (NAME, "manual", "2")
            assert REFUSAL in record["MESSAGE"]
        # Nothing is tried, so there is nothing to record; the exit status says that the guest waits.
        done, found = records_of(daemon, "recover", "--unattended")
        assert (done.returncode, found, REFUSAL in done.stdout) == (4, [], True), done
    done, (record,) = records_of(daemon, "recover", guest.name)
    assert done.returncode == 0, done
    assert (record["SEVHOP_GUEST"], record["SEVHOP_RESULT"], record["PRIORITY"]) == (NAME, "destination", "5")
    guest.wait_for_ticks()


@pytest.fixture(params=["the daemon refuses them", "anybody may connect"])
def connectable(request: pytest.FixtureRequest, daemon: Daemon) -> Iterator[None]:
    """What users without rights may do with the daemon."""
    if request.param == "the daemon refuses them":
        yield
        return
    configuration = daemon.root / "etc/libvirt/libvirtd.conf"
    configuration.write_text(OPEN)
    try:
        daemon.restart()
        yield
    finally:
        configuration.unlink()
        daemon.restart()


#: Every command, as somebody would call it for a domain that is in the transit.
COMMANDS = (
    ("status", "--metrics-dir", "/run"),
    ("check", NAME),
    ("upgrade", NAME),
    ("upgrade", "--all"),
    ("prepare", NAME),
    ("recover",),
    ("recover", NAME),
    ("recover", NAME, "--discard", "--yes"),
    ("install",),
    ("install", "--verify"),
    ("uninstall",),
)


@pytest.mark.usefixtures("connectable")
def test_user_without_rights_gets_one_line_that_says_what_to_do(daemon: Daemon, guest: DomainGuest, new: Path) -> None:
    if daemon.run(*AS_NOBODY, sys.executable, "-m", "sevhop.cli", "--version").returncode:
        pytest.skip("this tree cannot be read by other users")
    with prepared(daemon, guest, new):
        for words in COMMANDS:
            done = daemon.run(*AS_NOBODY, sys.executable, "-m", "sevhop.cli", *words)
            assert (done.returncode, done.stdout) == (1, ""), (words, done)
            (line,) = done.stderr.splitlines()
            assert re.match(r"sevhop: .*\(run sevhop as root\)", line), (words, line)
            done = daemon.run(*AS_NOBODY, sys.executable, "-m", "sevhop.cli", *words, "--json")
            assert (done.returncode, done.stderr) == (1, ""), (words, done)
            assert_says_what_to_do(json.loads(done.stdout), words)
        guest.wait_for_ticks()
    assert daemon.sevhop("recover", guest.name).returncode == 0
    guest.wait_for_ticks()


def assert_says_what_to_do(found: dict[str, Any], words: tuple[str, ...]) -> None:
    """One shape of errors: of the whole command, or of each domain that `prepare` was given."""
    if domains := found.get("domains"):
        assert words[0] == "prepare"
        assert {(one["outcome"], one["hint"]) for one in domains} == {("refused", "run sevhop as root")}
        return
    state = None if words[0] in ("install", "uninstall") else "untouched"
    assert (found["outcome"], found["guest_state"]) == ("refused", state)
    assert found["reason"].endswith("(run sevhop as root)")


def test_other_hooks_are_called_by_libvirt_alone(daemon: Daemon, start: StartDomain) -> None:
    """
    A daemon that has started calls them for each domain that it finds, after it answers already. Whoever only asks does
    not have them called.
    """
    names = ["hooked-1", "hooked-2", "hooked-3"]
    for name in names:
        start(name=name)
    log = daemon.root / CALLS

    def calls() -> list[str]:
        return sorted(log.read_text().splitlines()) if log.exists() else []

    reconnected = [f"{name} reconnect/begin" for name in names]
    with another_hook(daemon, f'echo "$1 $2/$3" >>/{CALLS}'):
        try:
            daemon.restart()
            wait_until(lambda: calls() == reconnected, 30, "the daemon has called the hooks for each domain")
            for words in (["status"], ["status", "--json"], ["check", names[0]], ["prepare", "--all", "--dry-run"]):
                daemon.sevhop(*words)
            assert calls() == reconnected
            # Whether a daemon calls ours is found out once, which others may notice.
            for _ in range(2):
                daemon.sevhop("upgrade", "--all", "--dry-run")
            assert len(calls()) <= len(reconnected) + 1
        finally:
            log.unlink(missing_ok=True)
