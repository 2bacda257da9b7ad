"""The kernel's own tests of SEV (tools/testing/selftests/kvm), built once from Debian's source of the lab's kernel."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from pathlib import Path

from tests.support.guests import build

from . import builder
from .errors import LabError
from .kernels import SERIES, Kernel, locked, obtain

_BUILD = build.ROOT / "tools" / "lab" / "build-selftests"
#: Their names in the kernel's source. A series does not have all of them.
PROGRAMS = ("sev_migrate_tests", "sev_smoke_test", "sev_init2_tests")


def programs(series: str) -> Path:
    """The directory with those of PROGRAMS that a kernel's source has, from the cache or newly built.

    :raise LabError: the source is not to be had, or they cannot be built.
    """
    with locked(series):
        kernel = obtain(series)
        version = _version(kernel)
        ours = hashlib.sha256(_BUILD.read_bytes() + " ".join(PROGRAMS).encode()).hexdigest()[:8]
        wanted = kernel.workshop / f"selftests-{version}-{ours}"
        if not wanted.exists():
            # Of another version, or left by a build that was killed.
            for other in kernel.workshop.glob("selftests-*"):
                shutil.rmtree(other)
            _build(SERIES[series].suite, version, wanted)
        return wanted


def _version(kernel: Kernel) -> str:
    """Of the package that the kernel is from, and of its source.

    :raise LabError: it is not among the packages that were unpacked.
    """
    packages = (kernel.root / "packages").read_text()
    found = re.search(rf"^linux-image-{re.escape(kernel.release)}=(.+)$", packages, re.MULTILINE)
    if not found:
        raise LabError(f"{kernel.root} has no version of kernel {kernel.release}; remove it and try again")
    return found[1]


def _build(suite: str, version: str, directory: Path) -> None:
    print("lab: building the kernel's tests, once; this takes some minutes", file=sys.stderr, flush=True)
    package = f"linux-source-{'.'.join(version.split('.')[:2])}={version}"
    builder.run([_BUILD, suite, package, directory, *PROGRAMS], "the kernel's tests cannot be built")
