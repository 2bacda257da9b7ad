"""AppArmor's rules: added to files of the administrator's, removed, and accepted by the real parser."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import cast

import pytest
from sevhop.checks.domain import _confinement
from sevhop.checks.result import Status
from sevhop.install import apparmor
from sevhop_qmp import adopt_library
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess

UUID = "11111111-2222-3333-4444-555555555501"
RULES = b"/lib/adopt.so mr,\n"
FILES = [b"", b"\n", b"  /srv/** r,\n", b"  # no newline at the end", b"crlf\r\n", b"\xff\xfe not UTF-8\n", b"\n\n"]


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of Debian's profiles, in a kernel that has loaded none of libvirt's daemons."""
    if not Path("/etc/apparmor.d/abstractions/libvirt-qemu").exists() or shutil.which("apparmor_parser") is None:
        pytest.skip("not installed: apparmor, libvirt-daemon-system")
    copy = tmp_path / "apparmor.d"
    shutil.copytree("/etc/apparmor.d", copy, symlinks=True)
    # Not every release ships them; they are left empty then.
    for name in ("abstractions/libvirt-qemu", "usr.sbin.libvirtd"):
        path = copy / "local" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.touch()
    loaded = tmp_path / "profiles"
    loaded.write_text("lsb_release (enforce)\n")
    monkeypatch.setattr(apparmor, "PROFILES", copy)
    monkeypatch.setattr(apparmor, "_LOADED", loaded)
    return copy


def contents(directory: Path) -> dict[str, bytes]:
    """All files of a tree."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def as_compiled(line: str) -> str:
    """The path of a rule, as the parser compiles it."""
    command = ["apparmor_parser", "--skip-kernel-load", "--skip-cache", "--dump", "rule-exprs"]
    done = subprocess.run(command, input=f"profile x {{\n{line}\n}}\n", capture_output=True, text=True, check=True)
    (found,) = [row for row in done.stderr.splitlines() if row.startswith("rule: /srv/")]
    return found.partition("  ->  ")[2].partition(" (0x")[0].partition(" priority=")[0]  # that of AppArmor 4


@pytest.mark.parametrize("file", FILES)
def test_rules_are_added_and_removed(file: bytes) -> None:
    installed = apparmor.with_rules(file, RULES)
    assert RULES in installed
    assert apparmor.with_rules(installed, RULES) == installed
    assert apparmor.with_rules(apparmor.with_rules(file, b"older,\n"), RULES) == installed
    assert apparmor.with_rules(installed, b"") == file
    assert apparmor.with_rules(file, b"") == file


@pytest.mark.parametrize("file", FILES)
def test_rules_leave_lines_around_them(file: bytes) -> None:
    installed = b"# above\n" + apparmor.with_rules(file, RULES)
    assert apparmor.with_rules(installed, b"") == b"# above\n" + file


def test_rules_are_refused_if_a_mark_is_missing() -> None:
    installed = apparmor.with_rules(b"/srv/** r,\n", RULES)
    first, *between, end, other = installed.splitlines(keepends=True)
    for broken in ((first, *between, other), (*between, end, other)):
        with pytest.raises(ValueError, match="is missing"):
            apparmor.with_rules(b"".join(broken), RULES)


NAMES = ["plain", "two words", "star*", "any?", "one{two,three}", "@{HOME}", "^", '"']


@pytest.mark.parametrize("name", NAMES)
def test_path_in_a_rule_is_quoted(name: str, profiles: Path) -> None:
    """For a character with a special meaning the parser makes a bracket expression or an alternative."""
    assert as_compiled('"/srv/a?" r,') == "/srv/a[^\\x0/]"
    assert as_compiled(f"{apparmor.quoted(Path('/srv', name))} r,").replace("\\", "") == f"/srv/{name}"


def test_install_is_reverted_by_uninstall(profiles: Path) -> None:
    before = contents(profiles)
    assert apparmor.active()
    assert not apparmor.in_place()
    paths = [profiles / "local" / name for name in ("abstractions/libvirt-qemu", "usr.sbin.libvirtd")]
    assert apparmor.install() == paths
    assert apparmor.in_place()
    installed = contents(profiles)
    changed = {name for name in installed if installed[name] != before.get(name)}
    assert changed == {str(path.relative_to(profiles)) for path in paths}
    assert str(adopt_library.path()) in paths[0].read_text()
    assert apparmor.install() == paths
    assert contents(profiles) == installed
    assert apparmor.uninstall()
    assert contents(profiles) == before
    assert not apparmor.uninstall()


def test_uninstall_keeps_link_mode_and_owner(profiles: Path) -> None:
    path = profiles / "local" / "abstractions" / "libvirt-qemu"
    elsewhere = profiles / "local" / "kept-elsewhere"
    elsewhere.write_bytes(b"  /srv/** r,")
    elsewhere.chmod(0o640)
    os.chown(elsewhere, 0, 12)
    path.unlink()
    path.symlink_to(elsewhere)
    apparmor.install()
    apparmor.uninstall()
    assert path.is_symlink()
    after = elsewhere.stat()
    assert (elsewhere.read_bytes(), stat.S_IMODE(after.st_mode), after.st_gid) == (b"  /srv/** r,", 0o640, 12)


def test_install_is_rolled_back_if_the_parser_refuses_the_rules(
    profiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (profiles / "local" / "abstractions" / "libvirt-qemu").write_text("  /srv/** r,\n")
    before = contents(profiles)
    rules = tmp_path / "rules"
    rules.mkdir()
    (rules / "libvirt-qemu").write_text("/lib/adopt.so nonsense,\n")
    (rules / "libvirtd").write_text("")
    monkeypatch.setattr(apparmor, "_RULES", rules)
    with pytest.raises(SevhopError, match=r"AppArmor does not accept .*TEMPLATE\.qemu"):
        apparmor.install()
    assert contents(profiles) == before


def test_in_place_is_false_if_the_library_has_moved(profiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apparmor.install()
    assert apparmor.in_place()
    monkeypatch.setattr(adopt_library, "path", lambda: Path("/opt/new/adopt.so"))
    assert not apparmor.in_place()
    apparmor.install()
    assert apparmor.in_place()


def test_in_place_is_false_if_the_abstraction_omits_the_file(profiles: Path) -> None:
    apparmor.install()
    abstraction = profiles / "abstractions" / "libvirt-qemu"
    abstraction.write_text(re.sub(r"#?include [^<\n]*<local/", "# once <local/", abstraction.read_text()))
    assert not apparmor.in_place()
    abstraction.write_text(f"{abstraction.read_text()}\n  include if exists <local/abstractions/libvirt-qemu>\n")
    assert apparmor.in_place()


def test_install_does_nothing_without_apparmor(profiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apparmor, "_LOADED", profiles / "missing")
    before = contents(profiles)
    assert not apparmor.active()
    assert apparmor.install() == []
    assert contents(profiles) == before


class Confined:
    """A QEMU with a label."""

    def __init__(self, confinement: str) -> None:
        self.confinement = confinement


@pytest.mark.parametrize(
    ("confinement", "installed", "status", "reported"),
    [
        ("", False, Status.PASS, "none"),
        ("unconfined", False, Status.PASS, "none"),
        (f"libvirt-{UUID} (enforce)", True, Status.PASS, "AppArmor"),
        (f"libvirt-{UUID} (enforce)", False, Status.FAIL, "run: sevhop install"),
        (f"libvirt-{UUID} (complain)", False, Status.PASS, "AppArmor"),
        ("my-guests (enforce)", True, Status.FAIL, "my-guests"),
        ("something else", True, Status.FAIL, "something else"),
    ],
)
def test_confinement_fails_unless_it_permits_a_hop(
    confinement: str, installed: bool, status: Status, reported: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apparmor, "in_place", lambda: installed)
    result = _confinement(cast(QemuProcess, Confined(confinement)), UUID)
    assert result.status is status
    assert reported in f"{result.detail} {result.hint}"
    assert bool(result.hint) == (status is Status.FAIL)
