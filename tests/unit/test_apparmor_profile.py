"""The copy of a domain's AppArmor profile: its name, what is in it, when it is unloaded. The kernel is a directory."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from sevhop.process import apparmor_profile
from sevhop.process.apparmor_profile import ProfileCopy
from sevhop_qmp.errors import SevhopError

ORIGINAL = "libvirt-11111111-2222-3333-4444-555555555501"
ENFORCED = f"{ORIGINAL} (enforce)"
#: As virt-aa-helper makes it, with a rule of an administrator's.
FILE = f"""#
# This profile is for the domain whose UUID matches this file.
#

#include <tunables/global>

profile {ORIGINAL} flags=(attach_disconnected) {{
  #include <abstractions/libvirt-qemu>
  #include <libvirt/{ORIGINAL}.files>
  signal (receive) peer={ORIGINAL},
  signal (receive) peer=@{{profile_name}},
}}
"""
RULES = '  "/srv/web1.qcow2" rwk,\n'


class Kernel:
    """
    Stands in for the kernel, and for the parser that loads profiles into it.

    :ivar mode: of what is loaded.
    :ivar given: arguments and standard input of each parser.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.mode = "enforce"
        self.refusal = ""
        self.given: list[tuple[tuple[object, ...], bytes]] = []
        self.profiles({})

    def profiles(self, found: dict[str, str]) -> None:
        lines = [f"{name} ({mode})\n" for name, mode in found.items()]
        (self.directory / "profiles").write_text("".join(lines))

    def loaded(self) -> list[str]:
        return (self.directory / "profiles").read_text().splitlines()

    def parse(self, *arguments: object, text: bytes, base: Path) -> None:
        self.given.append((arguments, text))
        if self.refusal:
            raise SevhopError(self.refusal)
        (name,) = re.findall(rb"^profile (\S+)", text, re.MULTILINE)
        self.profiles({name.decode(): self.mode})


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """One in which the domain's own profile was made by libvirt. No process is confined."""
    for name in ("kernel", "proc", "profiles/libvirt"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "profiles/libvirt" / ORIGINAL).write_text(FILE)
    kernel = Kernel(tmp_path / "kernel")
    monkeypatch.setattr(apparmor_profile, "PROFILES", tmp_path / "profiles")
    monkeypatch.setattr(apparmor_profile, "KERNEL", kernel.directory)
    monkeypatch.setattr(apparmor_profile, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(apparmor_profile, "_UNUSED_TIMEOUT", 0.05)
    monkeypatch.setattr(apparmor_profile, "parse", kernel.parse)
    real_unload = apparmor_profile._unload

    def unload(name: str) -> None:
        real_unload(name)
        assert (kernel.directory / ".remove").read_text() == name
        rest = [line.rpartition(" ") for line in kernel.loaded()]
        kernel.profiles({other: mode.strip("()") for other, _, mode in rest if other != name})

    monkeypatch.setattr(apparmor_profile, "_unload", unload)
    return kernel


def confine(tmp_path: Path, pid: int, label: str, *, exited: bool = False) -> Path:
    """Have a process with a label."""
    process = tmp_path / "proc" / str(pid)
    (process / "attr").mkdir(parents=True)
    (process / "attr/current").write_text(f"{label}\n")
    if not exited:
        (process / "exe").symlink_to("/usr/bin/qemu-system-x86_64")
    return process


def copy(confinement: str = ENFORCED) -> ProfileCopy:
    found = ProfileCopy.of(confinement)
    assert found is not None
    return found


@pytest.mark.parametrize("confinement", ["", "unconfined"])
def test_process_that_nothing_confines_needs_no_copy(confinement: str) -> None:
    assert ProfileCopy.of(confinement) is None


@pytest.mark.parametrize(
    "confinement",
    [
        "libvirt-1234 (enforce)",
        "my-profile (enforce)",
        f"{ORIGINAL}//passt (enforce)",
        f"{ORIGINAL}//&:other:unconfined (enforce)",
        f"{ORIGINAL} (mixed)",
        f"{ORIGINAL} (kill)",
        ORIGINAL,
    ],
)
def test_only_what_libvirt_has_made_is_copied(confinement: str) -> None:
    with pytest.raises(SevhopError, match=re.escape(f"confined ({confinement}), which libvirt takes back")):
        ProfileCopy.of(confinement)


@pytest.mark.parametrize("mode", ["enforce", "complain"])
def test_name_is_one_that_other_tools_leave_alone(mode: str) -> None:
    one, other = copy(f"{ORIGINAL} ({mode})"), copy(f"{ORIGINAL} ({mode})")
    assert one.label.profile != other.label.profile
    assert one.label.profile.startswith(f"{ORIGINAL}-")
    assert str(one.label).endswith(f" ({mode})")
    assert re.fullmatch(r"libvirt-[0-9a-f\-]+", one.label.profile)  # as in aa-remove-unknown
    assert str(one.original) == f"{ORIGINAL} ({mode})"


def test_copy_differs_by_its_name_alone() -> None:
    wanted = FILE.replace(f"profile {ORIGINAL} ", "profile other ")
    assert apparmor_profile.renamed(FILE.encode(), ORIGINAL, "other") == wanted.encode()


@pytest.mark.parametrize("text", ["", FILE + FILE, FILE.replace(f"profile {ORIGINAL}", f"profile {ORIGINAL}0")])
def test_file_of_another_form_is_not_copied(kernel: Kernel, text: str) -> None:
    (apparmor_profile.PROFILES / "libvirt" / ORIGINAL).write_text(text)
    with pytest.raises(SevhopError, match=rf"cannot copy .*{ORIGINAL}: it has [02] profiles"):
        copy().load()
    assert kernel.given == []


def rule_expressions(base: Path, text: bytes) -> list[str]:
    """The rules of a profile as the real parser understands them."""
    command: list[str | Path] = ["apparmor_parser", "--base", base, "--skip-kernel-load", "--skip-cache"]
    command += ["--Optimize=no-minimize", "--dump", "rule-exprs"]
    done = subprocess.run(command, input=text, capture_output=True, check=True)
    return [line for line in done.stderr.decode().splitlines() if line.startswith("rule: ")]


def test_real_parser_finds_the_same_rules_in_the_copy(tmp_path: Path) -> None:
    """Those of libvirt's files too, but the copy itself is ``@{profile_name}`` in it."""
    if not Path("/etc/apparmor.d/abstractions/libvirt-qemu").exists() or shutil.which("apparmor_parser") is None:
        pytest.skip("not installed: apparmor, libvirt-daemon-system")
    base = tmp_path / "apparmor.d"
    shutil.copytree("/etc/apparmor.d", base, symlinks=True)
    (base / "libvirt" / f"{ORIGINAL}.files").write_text(RULES)
    name = copy().label.profile
    ours = rule_expressions(base, apparmor_profile.renamed(FILE.encode(), ORIGINAL, name))
    theirs = rule_expressions(base, FILE.encode())
    assert any("/srv/web1" in line for line in ours)
    assert [line.replace(name, ORIGINAL) for line in ours] == theirs
    command: list[str | Path] = ["apparmor_parser", "--base", base, "--names"]
    text = apparmor_profile.renamed(FILE.encode(), ORIGINAL, name)
    done = subprocess.run(command, input=text, capture_output=True, check=True)
    assert done.stdout.decode().split()[0] == name


@pytest.mark.parametrize("mode", ["enforce", "complain"])
def test_copy_is_loaded_in_the_mode_of_the_original(kernel: Kernel, mode: str) -> None:
    kernel.mode = mode
    one = copy(f"{ORIGINAL} ({mode})")
    one.load()
    assert kernel.loaded() == [str(one.label)]
    ((arguments, text),) = kernel.given
    assert ("--Complain" in arguments) == (mode == "complain")
    assert text == apparmor_profile.renamed(FILE.encode(), ORIGINAL, one.label.profile)


def test_copy_that_denies_less_than_the_original_is_not_used(kernel: Kernel) -> None:
    kernel.mode = "complain"
    with pytest.raises(SevhopError, match="as complain, and not as enforce"):
        copy().load()
    assert kernel.loaded() == []


def test_missing_file_is_reported(kernel: Kernel) -> None:
    (apparmor_profile.PROFILES / "libvirt" / ORIGINAL).unlink()
    with pytest.raises(SevhopError, match=rf"cannot read .*{ORIGINAL}: No such file"):
        copy().load()


def test_refusal_of_the_parser_is_reported(kernel: Kernel) -> None:
    kernel.refusal = "AppArmor does not accept a copy: syntax error"
    with pytest.raises(SevhopError, match="syntax error"):
        copy().load()


def test_parser_that_is_missing_or_fails_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: str(tmp_path / name))
    with pytest.raises(SevhopError, match=r"cannot run .*apparmor_parser: No such file") as caught:
        apparmor_profile.parse("--add", text=b"", base=tmp_path)
    assert caught.value.hint == "install the package apparmor"
    program = tmp_path / "apparmor_parser"
    program.write_text("#!/bin/sh\ncat >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(SevhopError, match="AppArmor does not accept a copy: the last line"):
        apparmor_profile.parse("--add", text=b"first\nthe last line\n", base=tmp_path)


def test_copy_that_confines_a_process_is_not_unloaded(kernel: Kernel, tmp_path: Path) -> None:
    """The process would be unconfined."""
    one = copy()
    one.load()
    confine(tmp_path, 4711, str(one.label))
    one.remove()
    assert kernel.loaded() == [str(one.label)]


def test_copy_that_confines_a_process_with_another_profile_is_not_unloaded(kernel: Kernel, tmp_path: Path) -> None:
    one = copy()
    one.load()
    confine(tmp_path, 4711, f"{one.label.profile}//&other (enforce)")
    one.remove()
    assert kernel.loaded() == [str(one.label)]


@pytest.mark.parametrize("who", ["nobody", "other", "exited"])
def test_copy_that_confines_nothing_is_unloaded(kernel: Kernel, tmp_path: Path, who: str) -> None:
    one = copy()
    one.load()
    if who != "nobody":
        confine(tmp_path, 4711, ENFORCED if who == "other" else str(one.label), exited=who == "exited")
    one.remove()
    one.remove()
    assert kernel.loaded() == []


def test_last_process_is_waited_for(kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = copy()
    one.load()
    process = confine(tmp_path, 4711, str(one.label))
    monkeypatch.setattr(apparmor_profile, "_UNUSED_TIMEOUT", 60.0)
    asked = threading.Event()
    confines = apparmor_profile._confines

    def seen(name: str) -> bool:
        found = confines(name)
        asked.set()
        return found

    monkeypatch.setattr(apparmor_profile, "_confines", seen)
    removing = threading.Thread(target=one.remove)
    removing.start()
    assert asked.wait(30)
    shutil.rmtree(process)
    removing.join(30)
    assert kernel.loaded() == []


def test_copies_that_a_killed_command_has_left_are_removed(kernel: Kernel, tmp_path: Path, monkeypatch: Any) -> None:
    """But not one in which a transit runs, and none of another domain's."""
    unused, used, other = f"{ORIGINAL}-00000001", f"{ORIGINAL}-00000002", f"{ORIGINAL[:-1]}2-00000001"
    kernel.profiles(dict.fromkeys((ORIGINAL, unused, used, other), "enforce"))
    confine(tmp_path, 4711, f"{used} (enforce)")
    one = copy()

    def parse(*arguments: object, text: bytes, base: Path) -> None:
        assert kernel.loaded() == [f"{name} (enforce)" for name in (ORIGINAL, used, other)]
        kernel.parse(*arguments, text=text, base=base)

    monkeypatch.setattr(apparmor_profile, "parse", parse)
    one.load()
    assert kernel.given


def test_nothing_is_removed_without_a_name(kernel: Kernel) -> None:
    kernel.profiles({ORIGINAL: "enforce"})
    apparmor_profile.remove("")
    assert kernel.loaded() == [ENFORCED]


def test_host_without_apparmor_has_nothing_to_remove(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(apparmor_profile, "KERNEL", tmp_path / "none")
    apparmor_profile.remove(f"{ORIGINAL}-00000001")
