"""QEMU binaries: what they report of themselves, and who could replace them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sevhop.guest import emulator
from sevhop.guest.emulator import probe, untrusted_writer
from sevhop_qmp.errors import SevhopError

from tests.support.guests.running import wait_ended

NOBODY = 65534
GREETING = '{"QMP": {"version": {"qemu": {"micro": 3, "minor": 1, "major": 11}, "package": ""}, "capabilities": []}}'
MACHINES = '{"return": [{"name": "pc-q35-11.1", "alias": "q35"}, {"name": "none"}]}'
EVENT = '{"timestamp": {"seconds": 1, "microseconds": 1}, "event": "SHUTDOWN"}'


def program(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def printing(path: Path, *lines: str) -> Path:
    """A program that prints these lines, and logs each start."""
    text = "\n".join(lines)
    return program(path, f"echo started >>{path}.log\ncat <<'END'\n{text}\nEND")


def test_version_and_machine_types_are_read(tmp_path: Path) -> None:
    path = printing(tmp_path / "qemu", GREETING, EVENT, '{"return": {}}', MACHINES, '{"return": {}}', EVENT)
    found = probe(str(path))
    assert (found.path, found.version) == (str(path), "11.1.3")
    assert found.machine_types == {"pc-q35-11.1", "q35", "none"}
    assert found.needs_pipe


def test_emulator_of_rhel_is_known_with_its_machine_types(tmp_path: Path) -> None:
    """It has a name and machine types of its own, and a version with a suffix."""
    greeting = GREETING.replace('"package": ""', '"package": "qemu-kvm-9.0.0-10.el9_5"')
    machines = (
        '{"return": [{"name": "pc-q35-rhel9.4.0", "alias": "q35"}, {"name": "pc-q35-rhel9.2.0"}, '
        '{"name": "pc-i440fx-rhel7.6.0", "alias": "pc"}]}'
    )
    path = printing(tmp_path / "qemu-kvm", greeting, '{"return": {}}', machines, '{"return": {}}')
    found = probe(str(path))
    assert found.version == "11.1.3"
    assert found.machine_types >= {"pc-q35-rhel9.4.0", "pc-q35-rhel9.2.0", "q35"}


def test_script_that_hangs_is_killed_with_what_it_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator, "PATIENCE", 1.0)
    path = program(tmp_path / "qemu", f"sleep 60 &\necho $! >{tmp_path}/pid\nwait")
    with pytest.raises(SevhopError, match="no answer within 1 s"):
        probe(str(path))
    assert wait_ended(int((tmp_path / "pid").read_text()), 10)


def test_binary_is_probed_once_until_it_changes(tmp_path: Path) -> None:
    path = printing(tmp_path / "qemu", GREETING, "{}", MACHINES)
    log = Path(f"{path}.log")
    for _ in range(3):
        probe(str(path))
    assert log.read_text().count("started") == 1
    printing(path, GREETING.replace('"major": 11', '"major": 12'), "{}", MACHINES)
    assert probe(str(path)).version == "12.1.3"


@pytest.mark.parametrize("version", ["7.2.22", "10.2.99", "11.0.0", "11.1.3"])
def test_pipe_is_needed_from_version_11(version: str) -> None:
    assert emulator.Emulator("/qemu", version, frozenset()).needs_pipe == version.startswith("11.")


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["QEMU emulator version 7.2"],
        [GREETING],
        ["[]", "[]", "[]"],
        ["1", "1", "1"],
        [GREETING, "{}", '{"return": 1}'],
        [GREETING, "{}", '{"return": [1]}'],
        [GREETING.replace("11", '"11"'), "{}", MACHINES],
        [GREETING, "{}", '{"error": {"class": "CommandNotFound"}}'],
        ["\udcff"],
    ],
)
def test_program_that_is_no_qemu_is_refused(lines: list[str], tmp_path: Path) -> None:
    path = tmp_path / "qemu"
    path.write_bytes(b"#!/bin/sh\ncat <<'END'\n" + os.fsencode("\n".join(lines)) + b"\nEND\n")
    path.chmod(0o755)
    with pytest.raises(SevhopError, match="not a QEMU system emulator"):
        probe(str(path))


def test_program_that_cannot_be_started_is_refused(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    for path, reason in (
        ("qemu-system-x86_64", "not an absolute path"),
        (str(tmp_path / "none"), "No such file"),
        (str(plain), "Permission denied"),
        (str(tmp_path), "Permission denied"),
    ):
        with pytest.raises(SevhopError, match=reason) as caught:
            probe(path)
        assert caught.value.hint


def test_untrusted_program_is_not_started(tmp_path: Path) -> None:
    path = printing(tmp_path / "qemu", GREETING, "{}", MACHINES)
    path.chmod(0o757)
    with pytest.raises(SevhopError, match="cannot be trusted with a guest: everybody may write") as caught:
        probe(str(path))
    assert caught.value.hint
    assert not Path(f"{path}.log").exists()


# -- trust -----------------------------------------------------------------------------------------


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    """A file that only root may write to."""
    directory = tmp_path / "directory"
    directory.mkdir(mode=0o755)
    (directory / "qemu").touch(0o755)
    return directory / "qemu"


def test_file_of_root_is_trusted(binary: Path) -> None:
    assert untrusted_writer(str(binary)) == ""


def test_file_is_untrusted_if_others_may_write_to_it(binary: Path) -> None:
    for path in (binary, binary.parent):
        path.chmod(0o777)
        assert untrusted_writer(str(binary)) == f"everybody may write to {path}"
        path.chmod(0o755)


def test_file_of_root_in_a_sticky_directory_is_trusted(binary: Path) -> None:
    binary.parent.chmod(0o1777)
    assert untrusted_writer(str(binary)) == ""
    os.chown(binary, NOBODY, 0)
    assert untrusted_writer(str(binary)) == f"{binary} belongs to user nobody"


def test_file_is_untrusted_if_owned_by_another_user(binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(binary.parent, 54321, 0)
    assert untrusted_writer(str(binary)) == f"{binary.parent} belongs to user 54321"
    monkeypatch.setenv("SUDO_UID", "54321")
    assert untrusted_writer(str(binary)) == "", "the user who called us by sudo can become root anyway"


def test_file_is_untrusted_if_a_group_may_write_to_it(binary: Path) -> None:
    binary.chmod(0o775)
    assert untrusted_writer(str(binary)) == "", "root's private group"
    os.chown(binary, 0, 54321)
    assert untrusted_writer(str(binary)) == f"group 54321 may write to {binary}"


def test_emulator_behind_links_is_found(binary: Path, tmp_path: Path) -> None:
    others = tmp_path / "others"
    others.mkdir()
    link = others / "link"
    link.symlink_to("../directory/../directory/qemu")
    second = tmp_path / "second"
    second.symlink_to(link)
    assert untrusted_writer(str(second)) == ""
    binary.parent.chmod(0o777)
    assert untrusted_writer(str(second)) == f"everybody may write to {binary.parent}"
    binary.parent.chmod(0o755)
    others.chmod(0o777)
    assert untrusted_writer(str(second)) == f"everybody may write to {others}", "the link could be replaced"
    others.chmod(0o1777)
    os.chown(link, NOBODY, 0, follow_symlinks=False)
    assert untrusted_writer(str(second)) == f"{link} belongs to user nobody"


def test_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(SevhopError, match="too many symbolic links"):
        probe(str(tmp_path / "a"))
