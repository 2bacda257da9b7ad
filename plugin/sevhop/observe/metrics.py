"""
Metrics for Prometheus, as a file for the textfile collector of its node exporter.

=================================== ==============================================================================
``sevhop_hops_total``               hops by ``outcome``
``sevhop_downtime_seconds``         histogram: guest downtime of the hops that are done
``sevhop_outdated_domains``         domains whose QEMU is not the installed one
``sevhop_blocked_domains``          domains that cannot hop
``sevhop_restart_required_domains`` those of them that cannot until they were shut down and started again
``sevhop_guests``                   guests of domains by ``place``: the domain, the transit, the keeper
``sevhop_unattended_guests``        guests with a hop that no command is at work on
``sevhop_elsewhere_seconds``        how long the longest guest has been in a transit or the keeper
=================================== ==============================================================================

The last six are of the last time when domains were counted.

Commands are short-lived, so the file is also the store of the counters: each command reads it at its end, adds, and
replaces it atomically, under a lock. The directory may belong to another user. What is read there is used only if it is
a regular file with exactly these metrics in it; otherwise counters start from zero, which Prometheus handles as a
reset. A new file is written under a name that cannot be guessed.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sevhop_qmp.errors import SevhopError

from ..checks.domain_status import DomainStatus, Place
from ..records import journal
from ..report import Report

#: The collector reads all files of this suffix.
FILE = "sevhop.prom"
OUTCOMES = ("done", "refused", "rolled-back", "recovery-required", "guest-lost")
#: Upper bounds in seconds: a hop takes milliseconds, an upgrade some tenths of a second.
BOUNDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)

_HOPS = "sevhop_hops_total"
_DOWNTIME = "sevhop_downtime_seconds"
_OUTDATED = "sevhop_outdated_domains"
_BLOCKED = "sevhop_blocked_domains"
_RESTART_REQUIRED = "sevhop_restart_required_domains"
_GUESTS = "sevhop_guests"
_UNATTENDED = "sevhop_unattended_guests"
_ELSEWHERE = "sevhop_elsewhere_seconds"
#: Those of a domain's guest.
_PLACES = (Place.DOMAIN, Place.TRANSIT, Place.KEEPER)
_MOST_BYTES = 64 << 10
_SAMPLE = re.compile(r"(?P<name>[a-z_]+(?:\{[a-z]+=\"[^\"\\\n]*\"\})?) (?P<value>[0-9]{1,15}(?:\.[0-9]{1,9})?)")


def add(path: Path, reports: Iterable[Report] = (), domains: Sequence[DomainStatus] | None = None) -> None:
    """
    Add to the file in a directory.

    :param reports: of hops that are over; those of prepared and checked ones are not counted.
    :param domains: all of them; None if they were not counted.
    :raises SevhopError: it cannot be written.
    """
    try:
        with _locked(), _opened(path) as directory:
            samples = _zeros() | _read(directory)
            for report in reports:
                if report.outcome in OUTCOMES:
                    _count(samples, report)
            if domains is not None:
                samples |= _gauges(domains)
            _write(directory, samples)
    except OSError as err:
        raise SevhopError(
            f"cannot write metrics to {path}: {err.strerror}", "correct --metrics-dir, or the directory's permissions"
        ) from err


def _count(samples: dict[str, float], report: Report) -> None:
    samples[f'{_HOPS}{{outcome="{report.outcome}"}}'] += 1
    if report.outcome == "done" and report.downtime_ms is not None:
        seconds = report.downtime_ms / 1e3
        for bound in (*BOUNDS, math.inf):
            samples[_bucket(bound)] += seconds <= bound
        samples[f"{_DOWNTIME}_sum"] += seconds
        samples[f"{_DOWNTIME}_count"] += 1


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Exclude other commands. The lock is on a directory that only root can open, so no other user can block us."""
    journal.DIRECTORY.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _opened(journal.DIRECTORY) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _opened(directory: Path) -> Iterator[int]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _bucket(bound: float) -> str:
    return f'{_DOWNTIME}_bucket{{le="{"+Inf" if bound == math.inf else bound}"}}'


def _zeros() -> dict[str, float]:
    """All samples at zero, without that of outdated domains, which may never have been counted."""
    hops = {f'{_HOPS}{{outcome="{outcome}"}}': 0.0 for outcome in OUTCOMES}
    buckets = {_bucket(bound): 0.0 for bound in (*BOUNDS, math.inf)}
    return hops | buckets | {f"{_DOWNTIME}_sum": 0.0, f"{_DOWNTIME}_count": 0.0}


def _gauges(domains: Sequence[DomainStatus]) -> dict[str, float]:
    found: dict[str, float] = {
        _OUTDATED: sum(row.outdated for row in domains),
        _BLOCKED: sum(bool(row.blocker) for row in domains),
        _RESTART_REQUIRED: sum(bool(row.restart_required) for row in domains),
        _UNATTENDED: sum(not row.attended for row in domains),
        _ELSEWHERE: max((row.elsewhere_s or 0.0 for row in domains), default=0.0),
    }
    return found | {f'{_GUESTS}{{place="{one.value}"}}': sum(row.place is one for row in domains) for one in _PLACES}


def _read(directory: int) -> dict[str, float]:
    """The counters so far; none if there is no file, or it is not one of ours."""
    try:
        # Without O_NONBLOCK this would block on a FIFO.
        fd = os.open(FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return {}
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST_BYTES:
            return {}
        lines = file.read(_MOST_BYTES).decode(errors="replace").splitlines()
    samples = {}
    for line in lines:
        if not line.startswith("#"):
            match = _SAMPLE.fullmatch(line)
            if match is None:
                return {}
            samples[match["name"]] = float(match["value"])
    return samples if samples.keys() - _gauges(()).keys() == _zeros().keys() else {}


def _write(directory: int, samples: dict[str, float]) -> None:
    temporary = f".{secrets.token_hex(16)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(temporary, flags, 0o600, dir_fd=directory)
    try:
        with open(fd, "w", encoding="ascii") as file:
            file.write(_text(samples))
            os.fchmod(fd, 0o644)
        os.rename(temporary, FILE, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=directory)
        raise


def _text(samples: dict[str, float]) -> str:
    """In the exposition format (https://prometheus.io/docs/instrumenting/exposition_formats/)."""
    families = {
        _HOPS: ("counter", "Hops of guests to another QEMU, by outcome."),
        _DOWNTIME: ("histogram", "Guest downtime of the hops that are done, in seconds."),
        _OUTDATED: ("gauge", "Domains whose QEMU is not the installed one, when last counted."),
        _BLOCKED: ("gauge", "Domains that cannot hop, when last counted."),
        _RESTART_REQUIRED: ("gauge", "Domains that cannot hop until they were started again, when last counted."),
        _GUESTS: ("gauge", "Guests of domains by the place where they are, when last counted."),
        _UNATTENDED: ("gauge", "Guests with a hop that no command is at work on, when last counted."),
        _ELSEWHERE: ("gauge", "How long the longest guest has been in a transit or the keeper, in seconds."),
    }
    lines = []
    for family, (kind, text) in families.items():
        rows = [f"{name} {_number(value)}" for name, value in samples.items() if name.startswith(family)]
        if rows:
            lines += [f"# HELP {family} {text}", f"# TYPE {family} {kind}", *rows]
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:.6f}"
