"""QEMU binaries: what they say of themselves, and who could exchange them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sevhop.guest import emulator
from sevhop.guest.emulator import distrust, look
from sevhop_qmp.errors import SevhopError

NOBODY = 65534
GREETING = '{"QMP": {"version": {"qemu": {"micro": 3, "minor": 1, "major": 11}, "package": ""}, "capabilities": []}}'
MACHINES = '{"return": [{"name": "pc-q35-11.1", "alias": "q35"}, {"name": "none"}]}'
EVENT = '{"timestamp": {"seconds": 1, "microseconds": 1}, "event": "SHUTDOWN"}'


def program(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def saying(path: Path, *lines: str) -> Path:
    """A program that says these lines, and notes each time that it is started."""
    text = "\n".join(lines)
    return program(path, f"echo started >>{path}.log\ncat <<'END'\n{text}\nEND")


def test_what_a_qemu_says(tmp_path: Path) -> None:
    path = saying(tmp_path / "qemu", GREETING, EVENT, '{"return": {}}', MACHINES, '{"return": {}}', EVENT)
    found = look(str(path))
    assert (found.path, found.version) == (str(path), "11.1.3")
    assert found.machine_types == {"pc-q35-11.1", "q35", "none"}
    assert found.wants_pipe


def test_it_is_asked_once_until_it_changes(tmp_path: Path) -> None:
    path = saying(tmp_path / "qemu", GREETING, "{}", MACHINES)
    log = Path(f"{path}.log")
    for _ in range(3):
        look(str(path))
    assert log.read_text().count("started") == 1
    saying(path, GREETING.replace('"major": 11', '"major": 12'), "{}", MACHINES)
    assert look(str(path)).version == "12.1.3"


@pytest.mark.parametrize("version", ["7.2.22", "10.2.99", "11.0.0", "11.1.3"])
def test_who_wants_a_pipe(version: str) -> None:
    assert emulator.Emulator("/qemu", version, frozenset()).wants_pipe == version.startswith("11.")


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
def test_no_qemu(lines: list[str], tmp_path: Path) -> None:
    path = tmp_path / "qemu"
    path.write_bytes(b"#!/bin/sh\ncat <<'END'\n" + os.fsencode("\n".join(lines)) + b"\nEND\n")
    path.chmod(0o755)
    with pytest.raises(SevhopError, match="not a QEMU system emulator"):
        look(str(path))


def test_programs_that_cannot_be_started(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    for path, reason in (
        ("qemu-system-x86_64", "not a whole path"),
        (str(tmp_path / "none"), "No such file"),
        (str(plain), "Permission denied"),
        (str(tmp_path), "Permission denied"),
    ):
        with pytest.raises(SevhopError, match=reason) as caught:
            look(path)
        assert caught.value.hint


def test_a_program_that_is_not_trusted_is_not_started(tmp_path: Path) -> None:
    path = saying(tmp_path / "qemu", GREETING, "{}", MACHINES)
    path.chmod(0o757)
    with pytest.raises(SevhopError, match="cannot be trusted with a guest: everybody may write") as caught:
        look(str(path))
    assert caught.value.hint
    assert not Path(f"{path}.log").exists()


# -- trust -----------------------------------------------------------------------------------------


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    """A file that only root may change."""
    directory = tmp_path / "directory"
    directory.mkdir(mode=0o755)
    (directory / "qemu").touch(0o755)
    return directory / "qemu"


def test_roots_own(binary: Path) -> None:
    assert distrust(str(binary)) == ""


def test_the_file_or_a_directory_may_be_written(binary: Path) -> None:
    for path in (binary, binary.parent):
        path.chmod(0o777)
        assert distrust(str(binary)) == f"everybody may write to {path}"
        path.chmod(0o755)


def test_a_sticky_directory_is_safe_for_what_is_roots(binary: Path) -> None:
    binary.parent.chmod(0o1777)
    assert distrust(str(binary)) == ""
    os.chown(binary, NOBODY, 0)
    assert distrust(str(binary)) == f"{binary} belongs to user nobody"


def test_somebody_elses(binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(binary.parent, 54321, 0)
    assert distrust(str(binary)) == f"{binary.parent} belongs to user 54321"
    monkeypatch.setenv("SUDO_UID", "54321")
    assert distrust(str(binary)) == "", "who has called us as root may do anything anyway"


def test_groups(binary: Path) -> None:
    binary.chmod(0o775)
    assert distrust(str(binary)) == "", "root's own group"
    os.chown(binary, 0, 54321)
    assert distrust(str(binary)) == f"group 54321 may write to {binary}"


def test_links(binary: Path, tmp_path: Path) -> None:
    others = tmp_path / "others"
    others.mkdir()
    link = others / "link"
    link.symlink_to("../directory/../directory/qemu")
    second = tmp_path / "second"
    second.symlink_to(link)
    assert distrust(str(second)) == ""
    binary.parent.chmod(0o777)
    assert distrust(str(second)) == f"everybody may write to {binary.parent}"
    binary.parent.chmod(0o755)
    others.chmod(0o777)
    assert distrust(str(second)) == f"everybody may write to {others}", "the link could be another one"
    others.chmod(0o1777)
    os.chown(link, NOBODY, 0, follow_symlinks=False)
    assert distrust(str(second)) == f"{link} belongs to user nobody"


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(SevhopError, match="too many symbolic links"):
        look(str(tmp_path / "a"))
