"""What confines a process, as the kernel reports it, compared."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
from sevhop.checks.confinement import reason_against, sandboxed
from sevhop.process.confinement import Confinement, differences
from sevhop_qmp.process import QemuProcess


@pytest.fixture
def own() -> Confinement:
    process = QemuProcess.open(os.getpid())
    try:
        return Confinement.of(process)
    finally:
        process.close()


def test_confinement_of_a_copy_does_not_differ(own: Confinement) -> None:
    assert differences(own, own._replace()) == []


@pytest.mark.parametrize(
    ("changed", "reported"),
    [
        ({"uids": (0, 0, 65534)}, "user is 0, 0, 65534 in the new QEMU, "),
        ({"gids": (1, 1, 1)}, "group is 1, 1, 1 in the new QEMU, "),
        ({"groups": (4, 5)}, "supplementary groups is 4, 5 in the new QEMU, "),
        ({"effective": 0x1000}, "effective capabilities is 0x1000 in the new QEMU, "),
        ({"bounding": 0x1000}, "bounding set of capabilities is 0x1000 in the new QEMU, "),
        ({"no_new_privs": True}, "no_new_privs is on in the new QEMU, off in the old one"),
        ({"seccomp": 2}, "seccomp mode is 2 in the new QEMU, "),
        ({"filters": 9}, "number of seccomp filters is 9 in the new QEMU, "),
        ({"label": "libvirt-1 (enforce)"}, "security label is libvirt-1 (enforce) in the new QEMU, "),
        ({"core_dump_filter": "7f"}, "core dump filter is 7f in the new QEMU, "),
        ({"umask": 0o7777}, "umask is 4095 in the new QEMU, "),
        ({"cgroups": (("memory", "/x"),)}, "cgroup is memory:/x in the new QEMU, "),
    ],
)
def test_difference_is_reported_for_each_attribute(own: Confinement, changed: dict[str, object], reported: str) -> None:
    (found,) = differences(own, own._replace(**changed))  # type: ignore[arg-type]
    assert found.startswith(reported)


def limited(own: Confinement, number: int, soft: int, hard: int) -> Confinement:
    limits = tuple((one, soft, hard) if one == number else (one, *rest) for one, *rest in own.limits)
    return own._replace(limits=limits)  # type: ignore[arg-type]


def test_limits_are_compared_but_for_what_a_newer_qemu_raises(own: Confinement) -> None:
    files = limited(own, resource.RLIMIT_NOFILE, 100, 200)
    assert differences(files, limited(own, resource.RLIMIT_NOFILE, 200, 200)) == []
    assert "RLIMIT_NOFILE" in differences(files, limited(own, resource.RLIMIT_NOFILE, 300, 300))[0]
    assert "RLIMIT_FSIZE" in differences(own, limited(own, resource.RLIMIT_FSIZE, 1, 2))[0]
    assert "RLIMIT_LOCKS" in differences(own, limited(own, 10, 1, 2))[0]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("-sandbox on", True),
        ("-sandbox on,spawn=deny", True),
        ("-sandbox enable=on,spawn=deny", True),
        ("-sandbox off", False),
        ("-sandbox off -sandbox on", True),
        ("-m 64", False),
        ("-perfmap -sandbox on", True),
        ("-name sandbox", False),
    ],
)
def test_sandbox_is_found_in_a_command_line(line: str, expected: bool) -> None:
    assert sandboxed(line.split()) == expected


def test_capabilities_other_than_the_users_are_refused(own: Confinement) -> None:
    user = own._replace(uids=(7, 7, 7), permitted=0, effective=0, ambient=0, filters=own.filters)
    assert reason_against(user, [], {}) == ""
    assert "0x1000, but a QEMU that is started by its user gets 0x0" in reason_against(
        user._replace(permitted=0x1000), [], {}
    )
    root = own._replace(uids=(0, 0, 0), permitted=0, effective=0, inheritable=0, bounding=0x3000)
    assert "it has changed them itself" in reason_against(root, [], {})


@pytest.mark.parametrize("name", ["LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT", "QEMU_MODULE_DIR", "GCONV_PATH"])
def test_code_that_somebody_else_can_write_is_refused(own: Confinement, name: str, tmp_path: Path) -> None:
    user = own._replace(uids=(7, 7, 7), permitted=0, effective=0, ambient=0)
    (tmp_path / "mine.so").touch()
    assert reason_against(user, [], {name: f"/lib/none.so:{tmp_path}/mine.so"}) == ""
    tmp_path.chmod(0o777)
    for path in (f"{tmp_path}/mine.so", f"{tmp_path}/none.so", f"{tmp_path}/none/none.so"):
        reason = reason_against(user, [], {name: f"/lib/some.so:{path}"})
        assert reason.endswith(f"everybody may write to {tmp_path}")
    assert reason_against(user, [], {"HOME": str(tmp_path)}) == ""
