"""Several domains at a time, and the records of it: systemd's journal, Prometheus, Ansible."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sevhop.install import units
from sevhop.observe import journald

from tests.support.guests.daemon import Daemon
from tests.support.guests.running import wait_until

from .conftest import StartDomain
from .failing import wrapper
from .systemd_journal import journal
from .transit_guest import kill_keeper_and_supervisor

UNABLE = "a-private-one"
NAMES = ("fleet-a", "fleet-b", "fleet-c")
PLAYBOOK = Path(__file__).parents[2] / "docs" / "examples" / "upgrade-qemu.yml"


def test_fleet_rolls_back_on_sigterm_and_records_upgrades(daemon: Daemon, start: StartDomain, new: Path) -> None:
    start(name=UNABLE, memory="private")
    guests = [start(name=name) for name in NAMES]
    pids = [guest.pid for guest in guests]
    for guest in guests:
        guest.wait_for_ticks()

    # All in progress are rolled back; none gets further than its first hop, in which the new QEMU does not start.
    silent = wrapper(daemon, "silent", new, 'case "$*" in *-incoming*) exec sleep 600;; esac')
    command = daemon.start_command(
        *(sys.executable, "-m", "sevhop.cli", "--verbose"),
        *("upgrade", *NAMES, "--jobs", "3", "--json", "--emulator", silent),
    )
    assert command.stderr is not None
    begun = [line.split(":", 1)[1].strip() for line, _ in zip(command.stderr, NAMES, strict=False)]
    assert begun == [f"{name}: check" for name in NAMES]
    for line in command.stderr:
        if line.strip().endswith(": acquire"):
            command.send_signal(signal.SIGTERM)
            break
    out, _ = command.communicate(timeout=120)
    outcomes = {one["guest"]: one["outcome"] for one in json.loads(out)["domains"]}
    assert (command.returncode, outcomes) == (3, dict.fromkeys(NAMES, "rolled-back"))
    assert [guest.pid for guest in guests] == pids
    for guest in guests:
        guest.wait_for_ticks()

    # One that cannot hop is skipped.
    metrics = daemon.root / "run" / "metrics"
    metrics.mkdir()
    with journal(daemon) as records:
        done = daemon.sevhop(
            *("upgrade", "--all", "--jobs", "4", "--json", "--emulator", new, "--metrics-dir", "/run/metrics"),
            *("--connect", "qemu+unix:///system?socket=/run/libvirt/libvirt-sock"),
        )
    assert (done.returncode, done.stderr) == (1, "")
    refused, *reports = json.loads(done.stdout)["domains"]
    assert (refused["guest"], refused["outcome"]) == (UNABLE, "refused")
    assert [(one["guest"], one["outcome"]) for one in reports] == [(name, "done") for name in NAMES]
    assert all(len(one["downtimes_ms"]) == 2 and not one["notes"] for one in reports)
    for guest in guests:
        assert guest.emulator() == str(new)
        guest.wait_for_ticks()
    for name in NAMES:
        of_it = [record for record in records if f"SEVHOP_GUEST={name}\n" in record]
        phases = [record for record in of_it if f"MESSAGE_ID={journald.PHASE}\n" in record]
        assert [record.partition("SEVHOP_PHASE=")[2].split("\n")[0] for record in phases] == [
            *("check", "check", "acquire", "prepare", "stop", "map", "save", "load", "commit", "resume", "finish"),
            *("keep", "retire", "restore"),
        ]
        (end,) = (record for record in of_it if f"MESSAGE_ID={journald.OUTCOME}\n" in record)
        assert "SEVHOP_OUTCOME=done\n" in end
        assert end is of_it[-1]
    families = text_string_to_metric_families((metrics / "sevhop.prom").read_text())
    samples = {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}
    assert samples["sevhop_hops_total", "refused"] == 1
    assert samples["sevhop_hops_total", "done"] == samples["sevhop_downtime_seconds_count",] == 3
    assert samples["sevhop_outdated_domains",] == 0


def setting(name: str) -> list[str]:
    """The values of a setting of the service that recovers guests."""
    lines = units.text("sevhop-recover.service").splitlines()
    return [word for line in lines if line.startswith(f"{name}=") for word in line.partition("=")[2].split()]


def system_calls(names: Iterable[str]) -> set[str]:
    """The calls that a ``SystemCallFilter`` allows, as systemd knows its groups."""
    done = subprocess.run(["systemd-analyze", "syscall-filter"], capture_output=True, text=True, check=True)
    groups: dict[str, set[str]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("@"):
            group = groups.setdefault(line.strip(), set())
        elif line.startswith("    ") and not line.strip().startswith("#"):
            group.add(line.strip())
    allowed: set[str] = set()
    todo = ["@default", *names]
    while todo:
        name = todo.pop()
        if name.startswith("@"):
            todo += groups.pop(name, ())
        else:
            allowed.add(name)
    return allowed


def test_service_upgrades_a_domain(daemon: Daemon, start: StartDomain, new: Path) -> None:
    """In namespaces like those that its unit asks for, as no systemd makes them here."""
    assert {"PrivateNetwork=yes", "PrivateMounts=yes"} <= set(units.text("sevhop-upgrade.service").splitlines())
    guest = start(name="served")
    guest.wait_for_ticks()
    done = daemon.run(
        *("unshare", "--net", "--mount", "--propagation", "slave", "--"),
        *(sys.executable, "-m", "sevhop.cli", "upgrade", "served", "--json", "--emulator", new),
    )
    (report,) = json.loads(done.stdout)["domains"]
    assert (report["outcome"], report["notes"]) == ("done", []), report["reason"]
    assert len(report["downtimes_ms"]) == 2
    guest.wait_for_ticks()


def test_service_allows_what_a_recovery_needs(daemon: Daemon, start: StartDomain, new: Path) -> None:
    """
    It starts a keeper for a guest in the transit, and with that one the upgrade is finished.

    Its limits are compared with the calls, as no systemd applies them here; capabilities are really dropped.
    """
    if shutil.which("systemd-analyze") is None:
        pytest.skip("not installed: systemd")
    guest = start(name="served")
    guest.wait_for_ticks()
    assert daemon.upgrade("served", "--emulator", new, "--prepare")["in_transit"]
    kill_keeper_and_supervisor(daemon)
    capabilities = ",".join(f"+{word.removeprefix('CAP_').lower()}" for word in setting("CapabilityBoundingSet"))
    service = daemon.start_command(
        *("strace", "--follow-forks", "--quiet=all", "--output=/run/calls"),
        *("setpriv", f"--bounding-set=-all,{capabilities}", "--no-new-privs", "--"),
        *(sys.executable, "-m", "sevhop.cli", "recover", "--timeout", "30"),
    )
    wait_until(lambda: bool(daemon.named("sevhop-keeper")), 60, "a keeper is started")
    done = daemon.recover_one("served")
    assert (done["status"], done["result"], done["detail"]) == (0, "destination", ""), done
    wait_until(lambda: daemon.left_over() == [], 30, "the keeper exits")
    assert service.wait(60) == 0
    calls = (daemon.root / "run/calls").read_text(errors="replace")
    done_calls = set(re.findall(r"^\d+ +([a-z]\w*)\(", calls, re.MULTILINE))
    assert {"pidfd_getfd", "pidfd_send_signal"} < done_calls
    assert done_calls - system_calls(setting("SystemCallFilter")) == set()
    assert set(re.findall(r" socket\((\w+)", calls)) <= set(setting("RestrictAddressFamilies"))
    assert not re.search(r" (?:setns|unshare)\(", calls)
    assert guest.emulator() == str(new)
    guest.wait_for_ticks()


def test_playbook_upgrades_domain_unless_in_check_mode(
    daemon: Daemon, start: StartDomain, new: Path, tmp_path: Path
) -> None:
    guest = start(name="playbook")
    guest.wait_for_ticks()
    variables = {
        "sevhop_command": [sys.executable, "-m", "sevhop.cli"],
        "sevhop_emulator": str(new),
        "ansible_become": False,
        "ansible_python_interpreter": sys.executable,
    }
    ansible = [
        *("env", f"ANSIBLE_HOME={tmp_path}", f"ANSIBLE_LOCAL_TEMP={tmp_path}", "ANSIBLE_PIPELINING=1"),
        *(f"{Path(sys.executable).parent}/ansible-playbook", "--inventory", "localhost,", "--connection", "local"),
        *("--extra-vars", json.dumps(variables), str(PLAYBOOK)),
    ]
    for more, changed, emulator in ((["--check"], 0, guest.emulator()), ([], 1, str(new))):
        done = daemon.run(*ansible, *more)
        assert done.returncode == 0, done.stdout + done.stderr
        (recap,) = re.findall(r"^localhost +: (.*)", done.stdout, re.MULTILINE)
        assert re.match(rf"ok=\d+ +changed={changed} +unreachable=0 +failed=0 ", recap)
        assert guest.emulator() == emulator
    guest.wait_for_ticks()
