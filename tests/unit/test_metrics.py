"""Metrics, as Prometheus' own parser reads them, and other files in their place."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sevhop.checks.domain_status import DomainStatus, Place
from sevhop.observe import metrics
from sevhop.records import journal
from sevhop.report import Report
from sevhop_qmp.errors import SevhopError


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "DIRECTORY", tmp_path / "state" / "journal")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The collector's."""
    path = tmp_path / "collector"
    path.mkdir()
    return path


def samples(directory: Path) -> dict[str, float]:
    """All samples, by name and label."""
    families = list(text_string_to_metric_families((directory / metrics.FILE).read_text()))
    kinds = {family.name: family.type for family in families}
    assert kinds.items() <= {
        ("sevhop_hops", "counter"),
        ("sevhop_downtime_seconds", "histogram"),
        ("sevhop_outdated_domains", "gauge"),
        ("sevhop_blocked_domains", "gauge"),
        ("sevhop_restart_required_domains", "gauge"),
        ("sevhop_guests", "gauge"),
        ("sevhop_unattended_guests", "gauge"),
        ("sevhop_elsewhere_seconds", "gauge"),
    }
    assert all(family.documentation for family in families)
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in families
        for sample in family.samples
    }


DOMAINS = [
    DomainStatus("a", "7.2.22", "unchanged", "10.0.13"),
    DomainStatus("b", "10.0.13", "unchanged", "10.0.13", blocker="it has a TPM", restart_required="memory: private"),
    DomainStatus("c", place=Place.TRANSIT, attended=False, elsewhere_s=90.5),
    DomainStatus("d", place=Place.TRANSIT, elsewhere_s=0.5),
    DomainStatus("e", place=Place.KEEPER, attended=False, blocker="it is suspended"),
]


def done(ms: float | None) -> Report:
    """The report of a hop with this downtime."""
    return Report(outcome="done", downtime_ms=ms)


def test_counters_are_zero_at_first(directory: Path) -> None:
    metrics.add(directory)
    found = samples(directory)
    assert set(found.values()) == {0.0}
    assert {f"sevhop_hops_total {outcome}" for outcome in metrics.OUTCOMES} < found.keys()
    assert "sevhop_outdated_domains" not in found


def test_counters_are_incremented_by_each_hop(directory: Path) -> None:
    metrics.add(directory, [done(9.3), done(None), Report(outcome="rolled-back", downtime_ms=100.0)], DOMAINS)
    metrics.add(directory, [done(228.25), done(60_000.0), Report(outcome="checked"), Report(outcome="prepared")])
    found = samples(directory)
    assert {name: value for name, value in found.items() if name.startswith("sevhop_hops") and value} == {
        "sevhop_hops_total done": 4.0,
        "sevhop_hops_total rolled-back": 1.0,
    }
    counts = [found[f"sevhop_downtime_seconds_bucket {bound}"] for bound in (*metrics.BOUNDS, "+Inf")]
    assert counts == [0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3]
    assert found["sevhop_downtime_seconds_count"] == 3
    assert found["sevhop_downtime_seconds_sum"] == pytest.approx(60.23755)
    assert found["sevhop_outdated_domains"] == 1
    assert found["sevhop_blocked_domains"] == 2
    assert found["sevhop_restart_required_domains"] == 1
    assert {place: found[f"sevhop_guests {place}"] for place in ("domain", "transit", "keeper")} == {
        "domain": 2,
        "transit": 2,
        "keeper": 1,
    }
    assert found["sevhop_unattended_guests"] == 2
    assert found["sevhop_elsewhere_seconds"] == 90.5
    metrics.add(directory, domains=[])
    assert samples(directory)["sevhop_outdated_domains"] == samples(directory)["sevhop_guests transit"] == 0
    assert samples(directory)["sevhop_hops_total done"] == 4
    assert os.listdir(directory) == [metrics.FILE]
    assert (directory / metrics.FILE).stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    "text",
    [
        "",
        "what is this",
        'sevhop_hops_total{outcome="done"} 7\n',
        'sevhop_hops_total{outcome="done"} NaN\n',
        "x" * (65 << 10),
        "\0\udcff",
    ],
)
def test_counting_starts_again_with_a_foreign_file(text: str, directory: Path) -> None:
    (directory / metrics.FILE).write_text(text, errors="surrogateescape")
    metrics.add(directory, [done(1.0)])
    assert samples(directory)["sevhop_hops_total done"] == 1


@pytest.mark.parametrize("line", ["other_total 5", "sevhop_outdated_domains -1", "what is this"])
def test_counting_starts_again_with_an_unknown_line(line: str, directory: Path) -> None:
    metrics.add(directory, [done(1.0)])
    with (directory / metrics.FILE).open("a") as file:
        file.write(f"{line}\n")
    metrics.add(directory, [done(1.0)])
    assert samples(directory)["sevhop_hops_total done"] == 1


@pytest.mark.parametrize("kind", ["link", "dangling link", "fifo"])
def test_links_and_fifos_are_replaced(kind: str, directory: Path, tmp_path: Path) -> None:
    """The owner of the directory can neither redirect a write nor block it."""
    path, victim = directory / metrics.FILE, tmp_path / "victim"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(victim)
        if kind == "link":
            victim.write_text("precious")
    metrics.add(directory, [done(1.0)])
    assert path.is_file() and not path.is_symlink()
    assert not victim.exists() or victim.read_text() == "precious"


def test_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SevhopError, match=r"cannot write metrics to .*/missing: No such file"):
        metrics.add(tmp_path / "missing", [done(1.0)])


def add_often(directory: Path, state: Path) -> None:
    journal.DIRECTORY = state
    for _ in range(50):
        metrics.add(directory, [done(1.0)])


def test_concurrent_commands_lose_no_count(directory: Path) -> None:
    context = multiprocessing.get_context("fork")
    commands = [context.Process(target=add_often, args=(directory, journal.DIRECTORY)) for _ in range(4)]
    for command in commands:
        command.start()
    for command in commands:
        command.join()
    assert samples(directory)["sevhop_hops_total done"] == 200
