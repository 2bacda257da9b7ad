"""
Builds adopt.so, which is no Python extension but a library to be preloaded into QEMU. Everything else is in setup.cfg.

``pip install .`` puts it into the package, ``pip install -e .`` into the tree: ``sevhop_qmp/preload/adopt.so``.
A directory of its own, because Python would take ``sevhop_qmp/adopt.so`` for the module ``sevhop_qmp.adopt``.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.build import build

SOURCES = "qmp_ext/adopt"
LIBRARY = "sevhop_qmp/preload/adopt.so"
FLAGS = ["-shared", "-fPIC", "-fvisibility=hidden", "-O2", "-Wall", "-Wextra", "-Werror"]


class BuildAdopt(Command):
    """Compiles adopt.so; the compiler is $CC, or cc."""

    description = "build the library that is preloaded into QEMU"
    user_options: list[tuple[str, str | None, str]] = []  # noqa: RUF012 - the protocol of setuptools' SubCommand
    editable_mode = False
    build_lib: str | None = None

    def initialize_options(self) -> None:
        self.build_lib = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def _target(self) -> Path:
        return Path("qmp_ext" if self.editable_mode else self.build_lib or ".", LIBRARY)

    def run(self) -> None:
        target = self._target()
        target.parent.mkdir(parents=True, exist_ok=True)
        # A QEMU may have the old one mapped: written beside it and renamed, never overwritten.
        fresh = target.with_suffix(".so.new")
        sources = sorted(str(path) for path in Path(SOURCES).glob("*.c"))
        self.spawn([*shlex.split(os.environ.get("CC", "cc")), *FLAGS, "-o", str(fresh), *sources])
        fresh.replace(target)

    def get_source_files(self) -> list[str]:
        return sorted(str(path) for path in Path(SOURCES).iterdir())

    def get_outputs(self) -> list[str]:
        return [str(self._target())]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BinaryDistribution(Distribution):
    """Compiled for this machine, although there is no Python extension in it."""

    def has_ext_modules(self) -> bool:
        return True


build.sub_commands = [*build.sub_commands, ("build_adopt", None)]

setup(cmdclass={"build_adopt": BuildAdopt}, distclass=BinaryDistribution)
