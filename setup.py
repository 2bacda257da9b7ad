"""
Builds what is not Python: adopt.so, a library to be preloaded into QEMU, and the client of libvirt's hook, a program.
Everything else is in setup.cfg.

``pip install .`` puts them into the packages, ``pip install -e .`` into the tree. ``sevhop_qmp/preload/adopt.so`` has a
directory of its own, because Python would take ``sevhop_qmp/adopt.so`` for the module ``sevhop_qmp.adopt``.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import NamedTuple

from setuptools import Command, Distribution, setup
from setuptools.command.build import build

WARNINGS = ["-O2", "-Wall", "-Wextra", "-Werror"]


class Compiled(NamedTuple):
    """
    :ivar sources: file or pattern, in the tree.
    :ivar package: directory in the tree that holds the package.
    :ivar target: in the package's parent directory.
    """

    sources: str
    headers: str
    flags: list[str]
    package: str
    target: str


TARGETS = [
    Compiled(
        "qmp_ext/adopt/*.c",
        "qmp_ext/adopt/*.h",
        ["-shared", "-fPIC", "-fvisibility=hidden"],
        "qmp_ext",
        "sevhop_qmp/preload/adopt.so",
    ),
    Compiled("plugin/sevhop/host/hook_client.c", "", [], "plugin", "sevhop/host/hook_client"),
]


def found(pattern: str) -> list[str]:
    """The files of a pattern."""
    return sorted(str(path) for path in Path().glob(pattern)) if pattern else []


class BuildNative(Command):
    """Compiles them; the compiler is $CC, or cc."""

    description = "build the library that is preloaded into QEMU, and the client of libvirt's hook"
    user_options: list[tuple[str, str | None, str]] = []  # noqa: RUF012 - the protocol of setuptools' SubCommand
    editable_mode = False
    build_lib: str | None = None

    def initialize_options(self) -> None:
        self.build_lib = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def _target(self, one: Compiled) -> Path:
        return Path(one.package if self.editable_mode else self.build_lib or ".", one.target)

    def run(self) -> None:
        for one in TARGETS:
            target = self._target(one)
            target.parent.mkdir(parents=True, exist_ok=True)
            # A process may have the old one mapped: written beside it and renamed, never overwritten.
            fresh = target.with_name(f"{target.name}.new")
            compiler = shlex.split(os.environ.get("CC", "cc"))
            self.spawn([*compiler, *WARNINGS, *one.flags, "-o", str(fresh), *found(one.sources)])
            fresh.replace(target)

    def get_source_files(self) -> list[str]:
        return [path for one in TARGETS for pattern in (one.sources, one.headers) for path in found(pattern)]

    def get_outputs(self) -> list[str]:
        return [str(self._target(one)) for one in TARGETS]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BinaryDistribution(Distribution):
    """Compiled for this machine, although there is no Python extension in it."""

    def has_ext_modules(self) -> bool:
        return True


build.sub_commands = [*build.sub_commands, ("build_native", None)]

setup(cmdclass={"build_native": BuildNative}, distclass=BinaryDistribution)
