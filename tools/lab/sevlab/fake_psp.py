"""Building the fake security processor, and proof that kvm-amd cannot distinguish it from ccp.ko by its symbols."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from .errors import LabError
from .kernels import Kernel

SOURCES = Path(__file__).resolve().parents[1] / "fake_psp"


def build(kernel: Kernel) -> bytes:
    """Compile the module for this kernel.

    :return: ccp.ko.
    :raise LabError: it does not compile, or a symbol's CRC differs from the one that kvm-amd.ko was built with.
    """
    with tempfile.TemporaryDirectory(dir=kernel.workshop, prefix="fake_psp.") as directory:
        for source in SOURCES.iterdir():
            shutil.copy(source, directory)
        # Type information for BPF would need pahole and the whole vmlinux. The headers ask for the compiler by the
        # version that built this kernel, which another release of Debian does not have.
        options = (f"M={directory}", "CONFIG_DEBUG_INFO_BTF_MODULES=", "CC=gcc")
        _run("the fake security processor does not compile", "make", "-C", kernel.headers, *options, "modules")
        compare_symbols(Path(directory, "Module.symvers"), kernel.headers / "Module.symvers")
        module = Path(directory, "ccp.ko")
        _run("the fake security processor's debug information cannot be removed", "strip", "--strip-debug", module)
        return module.read_bytes()


def compare_symbols(ours: Path, kernels: Path) -> None:
    """Compare the symbols of two Module.symvers files by CRC.

    The kernel compares them as well, but only those that kvm-amd uses, and it reports that in its log only.

    :raise LabError: a symbol of ours is not a symbol of the kernel's ccp.ko, or has another CRC.
    """
    real = {name: crc for name, (crc, module) in _symbols(kernels).items() if module.endswith("/ccp")}
    wrong = [name for name, (crc, _) in _symbols(ours).items() if real.get(name) != crc]
    if wrong:
        raise LabError("the fake security processor's symbols differ from those of ccp.ko: " + ", ".join(wrong))


def _symbols(file: Path) -> dict[str, tuple[str, str]]:
    """Name -> CRC and module, from lines of CRC, name, module, kind of export, name space; separated by tabs."""
    lines = (line.split("\t") for line in file.read_text().splitlines())
    return {name: (crc, module) for crc, name, module, *_ in lines}


def _run(reason: str, *command: str | Path) -> None:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    except FileNotFoundError as error:
        raise LabError(f"{error.filename} is not installed") from error
    if done.returncode:
        raise LabError(reason, done.stdout + done.stderr)
