"""
Builds the fuzz targets of adopt.so: its sources as they are, with other names for the functions that it is in front of.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[2] / "qmp_ext" / "adopt"
TARGETS = ("hello", "memory", "listeners", "kvm", "qmp")
_WARNINGS = ("-Wall", "-Wextra", "-Werror")
_FLAGS = ("-g", "-O1", "-fno-omit-frame-pointer", "-fno-pie", "-fno-sanitize-recover=all")
#: What the library defines in front of the C library: its definitions, and its own calls to them.
_INTERPOSED = (
    "ioctl memfd_create ftruncate ftruncate64 fallocate fallocate64 fcntl fcntl64 mmap mmap64 munmap madvise mlockall "
    "readv open open64 __open_2 __open64_2 fopen fopen64 posix_fadvise posix_fadvise64 bind unlink listen "
    "accept accept4 __libc_start_main"
).split()
#: What it calls of the C library that the world takes over.
_TAKEN_OVER = {
    "_exit": "exit",
    **{name: name for name in "calloc realloc free strdup pthread_create write send readlink".split()},
}
#: Its variables go into sections of their own, which are reset between two inputs.
_SECTIONS = {".data": "adopt_data", ".bss": "adopt_bss"}


def build(directory: Path, compiler: str = "gcc", *, libfuzzer: bool = False) -> dict[str, Path]:
    """
    Build all targets with address and undefined behaviour sanitizers.

    :param libfuzzer: with clang's libFuzzer; otherwise with ``random.c``.
    :return: target → program.
    :raises subprocess.CalledProcessError: the compiler reports why.
    """
    sanitizers = "address,undefined"
    instrument = [f"-fsanitize={sanitizers}" + (",fuzzer-no-link" if libfuzzer else "")]
    compile_ = [compiler, *_FLAGS, *_WARNINGS, "-I", str(SOURCES), "-I", str(HERE), "-c", "-o"]
    objects = []
    for source in sorted(SOURCES.glob("*.c")):
        if source.name == "libc.c":
            continue  # what is behind the library is the world
        done = directory / f"adopt-{source.stem}.o"
        subprocess.run([*compile_, str(done), str(source), *instrument], check=True)
        rename = [f"--redefine-sym={name}=adopt_{name}" for name in _INTERPOSED]
        rename += [f"--redefine-sym={name}=world_{ours}" for name, ours in _TAKEN_OVER.items()]
        rename += [f"--rename-section={name}={ours}" for name, ours in _SECTIONS.items()]
        subprocess.run(["objcopy", *rename, str(done)], check=True)
        objects.append(str(done))
    for name in ("world", "qemu", *([] if libfuzzer else ["random"])):
        done = directory / f"{name}.o"
        subprocess.run([*compile_, str(done), str(HERE / f"{name}.c"), f"-fsanitize={sanitizers}"], check=True)
        objects.append(str(done))
    programs = {}
    for target in TARGETS:
        own = directory / f"target-{target}.o"
        subprocess.run([*compile_, str(own), str(HERE / "target.c"), f"-DTARGET={target}", *instrument], check=True)
        programs[target] = directory / target
        link = [f"-fsanitize={sanitizers}" + (",fuzzer" if libfuzzer else ""), "-no-pie", "-pthread"]
        subprocess.run([compiler, *link, "-o", str(programs[target]), str(own), *objects], check=True)
    return programs
