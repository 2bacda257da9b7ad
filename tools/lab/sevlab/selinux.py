"""
Debian's SELinux policy, built without installing it, with the tools that change it.

The packages are unpacked into the lab's cache, and semodule(8) builds the policy there. The lab sees the same files at
the same paths, so that a policy module can be loaded in it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.support.guests import build

from . import builder
from .kernels import CACHE, locked

SUITE = "bookworm"
RULES = Path(__file__).with_name("lab.cil")
_PACKAGES = "selinux-policy-default", "policycoreutils", "selinux-utils"
_ONLY = "selinux-policy-default|policycoreutils|selinux-utils|libsemanage-common"
#: Modules that the package installs and does not enable.
_NOT_ENABLED = (
    "amtu bugzilla cobbler condor cyphesis git ksmtuned likewise livecd nessus numad oddjob openca soundserver "
    "thunderbird updfstab usernetctl"
)
#: Where the tools find each other.
_CONFIGURATION = """module-store = direct
expand-check=0
bzip-small=true
compiler-directory = {root}/usr/libexec/selinux/hll
[load_policy]
path = {root}/sbin/load_policy
[end]
[setfiles]
path = {root}/sbin/setfiles
args = -q -c $@ $<
[end]
[sefcontext_compile]
path = {root}/usr/sbin/sefcontext_compile
args = $@
[end]
"""


@dataclass(frozen=True)
class Policy:
    """
    A policy.

    :param root: the directory with its ``etc/selinux``, ``var/lib/selinux`` and the tools.
    """

    root: Path

    @property
    def binary(self) -> bytes:
        """What the kernel loads."""
        (file,) = (self.root / "etc/selinux/default/policy").glob("policy.*")
        return file.read_bytes()


def obtain() -> Policy:
    """The policy from the cache, built first if it is not there.

    :raise LabError: the packages are not to be had, or it cannot be built.
    """
    with locked("selinux"):
        digest = hashlib.sha256(Path(__file__).read_bytes() + RULES.read_bytes()).hexdigest()[:16]
        builds = CACHE / "selinux"
        root = builds / digest
        if not (root / "built").exists():
            shutil.rmtree(builds, ignore_errors=True)
            builds.mkdir(parents=True)
            _build(root)
            (root / "built").touch()
        return Policy(root)


def _build(root: Path) -> None:
    fetch: list[str | Path] = [build.ROOT / "tools" / "fetch-packages", "--only", _ONLY, SUITE, root]
    builder.run([*fetch, *_PACKAGES], "the packages of the policy could not be fetched")
    (root / "etc/selinux/semanage.conf").write_text(_CONFIGURATION.format(root=root))
    (root / "etc/selinux/config").write_text("SELINUX=permissive\nSELINUXTYPE=default\n")
    (root / "var/lib/selinux").mkdir(parents=True, exist_ok=True)
    packaged = root / "usr/share/selinux/default"
    modules = re.findall(r"\S+", (packaged / ".modules").read_text())
    words = [word for name in modules for word in ("-i", os.fspath(packaged / f"{name}.pp.bz2"))]
    words += [word for name in _NOT_ENABLED.split() for word in ("-d", name)]
    semodule: list[str | Path] = [root / "usr/sbin/semodule", "-p", root, "-s", "default", "-n"]
    builder.run([*semodule, "-X", "100", *words], "the policy cannot be built")
    # What the policy denies is in the kernel's log then, all of it.
    builder.run([*semodule, "-D", "-X", "300", "-i", RULES], "the lab's own rules cannot be added to the policy")
