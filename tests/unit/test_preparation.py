"""``sevhop prepare`` on a simulated daemon: which definitions are changed, and what is printed of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libvirt
import pytest
from sevhop import api
from sevhop.checks import definition, sev_host
from sevhop.cli.main import main
from sevhop.engine import preparation
from sevhop.guest import emulator
from sevhop.guest.emulator import Emulator
from sevhop.libvirt import prepared_xml
from sevhop.records import journal
from sevhop.records.hop_record import HopRecord, Process
from sevhop.records.journal import Journal

from .defined_domains import PASSWORD, FakeDaemon, FakeDomain, connect

DEFINED = """<domain type='kvm'>
  <name>{name}</name>
  <memory unit='KiB'>4194304</memory>
  <os>
    <type arch='x86_64' machine='{machine}'>hvm</type>
  </os>
  <features>
    <acpi/>
  </features>
  <devices>
    <emulator>/usr/bin/qemu</emulator>
    <graphics type='vnc' passwd='hunter2'/>
  </devices>
</domain>
"""
CONFIG = libvirt.VIR_DOMAIN_AFFECT_CONFIG
CURRENT = libvirt.VIR_DOMAIN_AFFECT_CURRENT


def domain(name: str, machine: str = "pc-q35-7.2", **fields: object) -> FakeDomain:
    return FakeDomain(name, DEFINED.format(name=name, machine=machine), **fields)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def no_hops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "hop_of", lambda _: None)
    monkeypatch.setattr(journal, "DIRECTORY", tmp_path)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Run the command: its exit status, and the rows of its domains."""

    def run(daemon: FakeDaemon, *words: str) -> tuple[int, dict[str, Any]]:
        connect(daemon, monkeypatch)
        status = main(["prepare", "--json", *words])
        printed = json.loads(capsys.readouterr().out)
        rows = {row["domain"]: row for row in printed["domains"]}
        return status, rows | ({"excluded": printed["excluded"]} if printed.get("excluded") else {})

    return run


Run = Callable[..., tuple[int, dict[str, Any]]]


def test_definition_is_prepared_with_its_password(run: Run) -> None:
    old = domain("old", "q35")
    daemon = FakeDaemon(old)
    status, rows = run(daemon, "old")
    assert status == 0
    assert rows["old"]["outcome"] == "done"
    assert rows["old"]["changes"] == ["memory in a shared memfd", "machine type pc-q35-7.2 instead of q35"]
    assert old.defined == prepared_xml.prepare(domain("old").defined, prepared_xml.Wanted()).xml
    assert PASSWORD in old.defined


def test_password_is_not_in_the_diff(run: Run) -> None:
    """Also not as a line around a change."""
    old = domain("old")
    old.defined = old.defined.replace("</memory>\n", f"</memory>\n  <graphics type='vnc'{PASSWORD}/>\n")
    daemon = FakeDaemon(old)
    status, rows = run(daemon, "old", "--dry-run")
    diff = str(rows["old"]["diff"])
    assert status == 0
    assert "+  <memoryBacking>\n" in diff
    assert "<graphics type='vnc'/>" in diff
    assert "hunter2" not in diff


def test_dry_run_changes_nothing(run: Run) -> None:
    daemon = FakeDaemon(domain("old"))
    status, rows = run(daemon, "old", "--dry-run")
    assert (status, rows["old"]["outcome"], daemon.defines) == (0, "checked", 0)
    assert rows["old"]["hint"] == "run: sevhop prepare old"


def test_second_time_there_is_nothing_to_do(run: Run) -> None:
    daemon = FakeDaemon(domain("old"))
    run(daemon, "old")
    status, rows = run(daemon, "old")
    assert (status, rows["old"]["outcome"], rows["old"]["diff"], daemon.defines) == (0, "unchanged", "", 1)


def test_edit_of_another_client_is_kept(run: Run) -> None:
    """It comes right before the definition is replaced."""

    def edit(reads: int) -> None:
        if reads == 2:
            old.defined = old.defined.replace("4194304", "8388608")

    old = domain("old", on_read=edit)
    daemon = FakeDaemon(old)
    status, rows = run(daemon, "old")
    assert (status, daemon.defines) == (0, 1)
    assert "8388608" in old.defined
    assert prepared_xml.prepare(old.defined, prepared_xml.Wanted()).changes == ()
    assert "8388608" in str(rows["old"]["diff"])


def test_definition_that_another_client_replaces_is_prepared_again(run: Run) -> None:
    """It comes right after ours, from one who has read it before."""
    before = DEFINED.format(name="old", machine="pc-q35-7.2").replace("4194304", "8388608")

    def replace(reads: int) -> None:
        if reads == 3:
            old.defined = before

    old = domain("old", on_read=replace)
    daemon = FakeDaemon(old)
    status, _ = run(daemon, "old")
    assert (status, daemon.defines) == (0, 2)
    assert old.defined == prepared_xml.prepare(before, prepared_xml.Wanted()).xml


def test_definition_that_changes_all_the_time_is_refused(run: Run) -> None:
    def edit(reads: int) -> None:
        old.defined = DEFINED.format(name="old", machine="pc-q35-7.2").replace("4194304", str(reads))

    old = domain("old", on_read=edit)
    daemon = FakeDaemon(old)
    status, rows = run(daemon, "old")
    assert (status, rows["old"]["outcome"], daemon.defines) == (1, "refused", 0)
    assert "all the time" in str(rows["old"]["reason"])


def test_all_leaves_out_who_asked_for_it(run: Run) -> None:
    daemon = FakeDaemon(
        domain("a"),
        domain("db-1"),
        domain("alone", left_alone=(CURRENT,)),
        domain("alone-from-the-next-start", left_alone=(CONFIG,)),
        domain("transient", persistent=False),
    )
    status, rows = run(daemon, "--all", "--exclude", "db-*")
    assert status == 0
    assert rows.pop("excluded") == ["alone", "alone-from-the-next-start", "db-1"]
    assert list(rows) == ["a"]


def test_named_domain_is_prepared_although_it_is_left_alone(run: Run) -> None:
    daemon = FakeDaemon(domain("alone", left_alone=(CURRENT, CONFIG)))
    assert run(daemon, "alone")[1]["alone"]["outcome"] == "done"


def test_unknown_domain_is_reported_before_any_is_changed(run: Run) -> None:
    daemon = FakeDaemon(domain("a"))
    assert run(daemon, "a", "tpyo") == (1, {})
    assert daemon.defines == 0


def test_transient_domain_is_refused_and_others_are_prepared(run: Run) -> None:
    daemon = FakeDaemon(domain("transient", persistent=False), domain("a"))
    status, rows = run(daemon, "transient", "a")
    assert status == 1
    assert (rows["transient"]["outcome"], rows["a"]["outcome"]) == ("refused", "done")
    assert prepared_xml.MEMORY_BACKING in str(rows["transient"]["hint"])


def test_domain_in_a_hop_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its end it changes the definition as well."""
    monkeypatch.setattr(preparation, "hop_of", Path)
    daemon = FakeDaemon(domain("a"))
    assert run(daemon, "a")[1]["a"]["outcome"] == "refused"
    assert daemon.defines == 0


def test_domain_whose_upgrade_waits_for_somebody_is_refused_with_what_to_do(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "hop_of", Path)
    a = domain("a")
    source = Process(1 << 22, 1)
    record = HopRecord("domain", "a", "none", True, source, uuid=a.UUIDString(), phase="prepared")
    Journal.begin(record).leave()
    assert run(FakeDaemon(a), "a")[1]["a"]["hint"] == "run: sevhop recover a"


def test_nothing_named_is_nothing_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = FakeDaemon(domain("a"))
    connect(daemon, monkeypatch)
    assert asyncio.run(api.prepare([])).domains == ()
    assert daemon.defines == 0


def test_what_cannot_be_prepared_is_noted(run: Run) -> None:
    old = domain("old", saved=True)
    old.defined = old.defined.replace("<acpi/>", "").replace("</devices>", "  <vsock/></devices>")
    notes = " ".join(map(str, run(FakeDaemon(old), "old")[1]["old"]["notes"]))
    assert "virsh managedsave-remove old" in notes
    assert "<vsock>" in notes
    assert "<acpi/>" in notes


def test_text_has_the_diff_and_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    connect(FakeDaemon(domain("old"), domain("transient", persistent=False)), monkeypatch)
    assert main(["prepare", "old", "transient"]) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("--- old, as defined\n+++ old, prepared\n@@ ")
    assert printed.out.endswith("\nold: prepared: memory in a shared memfd\n")
    assert printed.err.startswith("sevhop: transient: domain transient is transient")
    assert printed.err.endswith("; nothing was touched\n")


SEV = "<launchSecurity type='{}'><policy>{}</policy></launchSecurity>\n</domain>"


@pytest.mark.parametrize(
    ("version", "machine", "kind", "policy", "changed", "noted"),
    [
        ("7.2.22", "pc-q35-7.2", "sev", "0x0001", False, "a reboot after a hop is a shutdown"),
        ("10.0.13", "pc-q35-7.2", "sev", "0x0001", True, ""),
        ("10.0.13", "pc-q35-7.2", "sev", "0x0005", False, ""),
        ("10.0.13", "pc-q35-9.1", "sev", "0x0001", True, "machine type pc-q35-9.1 cannot hop"),
        ("9.0.0", "pc-q35-9.0", "sev", "0x0005", False, ""),
        ("10.0.13", "pc-q35-7.2", "sev-snp", "0x30000", False, "no kernel can move"),
    ],
)
def test_encrypted_guest_gets_what_its_emulator_has(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    machine: str,
    kind: str,
    policy: str,
    changed: bool,
    noted: str,
) -> None:
    monkeypatch.setattr(definition, "probe", lambda path: Emulator(path, version, frozenset()))
    monkeypatch.setattr(sev_host, "kernel_has_types", lambda: True)
    guest = domain("secret", machine)
    guest.defined = guest.defined.replace("</domain>", SEV.format(kind, policy))
    _, rows = run(FakeDaemon(guest), "secret")
    assert ("aux-ram-share=on" in guest.defined) is changed
    assert ("<hard_limit unit='KiB'>5242880</hard_limit>" in guest.defined) is (kind == "sev")
    notes = rows["secret"]["notes"]
    assert isinstance(notes, list)
    assert [noted in note for note in notes] == ([True] if noted else [])


def test_emulator_that_cannot_be_probed_is_noted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(definition, "probe", emulator.probe)
    guest = domain("secret")
    guest.defined = guest.defined.replace("</domain>", SEV.format("sev", "1")).replace("/usr/bin/qemu", "/nonexistent")
    _, rows = run(FakeDaemon(guest), "secret")
    assert rows["secret"]["outcome"] == "done"
    assert "/nonexistent" in str(rows["secret"]["notes"])


@pytest.mark.parametrize("prepared", [False, True])
def test_hint_names_the_command_until_the_definition_is_prepared(run: Run, prepared: bool) -> None:
    daemon = FakeDaemon(domain("old one"))
    if prepared:
        run(daemon, "old one")
    hint = asyncio.run(_hint(daemon, "old one"))
    assert ("sevhop prepare 'old one'" in hint) is not prepared
    assert "shut the domain down and start it" in hint


def test_hint_for_a_transient_domain_is_its_xml() -> None:
    daemon = FakeDaemon(domain("a", persistent=False))
    assert prepared_xml.MEMORY_BACKING in asyncio.run(_hint(daemon, "a"))


async def _hint(daemon: FakeDaemon, name: str) -> str:
    connection = daemon.connection()
    return await definition.hint(connection, await connection.domain(name), "pc-q35-7.2")
