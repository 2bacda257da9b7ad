"""What guests are made of is built once and kept in the cache of ``tools/``; its name changes with its sources."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

#: The project's root.
ROOT = Path(__file__).resolve().parents[3]


def _cache_directory() -> Path:
    command = [ROOT / "tools" / "cache-directory"]
    return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.removesuffix("\n"))


#: Where what is downloaded and built is kept, by all trees; QEMU's user can read it.
CACHE = _cache_directory()
_GUESTS = CACHE / "guests"


class Unavailable(Exception):
    """Something is not installed or cannot be downloaded, and a guest cannot do without; one line has what and why."""


class BuildFailed(Exception):
    """A guest could not be built although everything is there; the message has the tool's own words."""


def run(command: Sequence[str | Path]) -> str:
    """
    Run a tool and return what it prints.

    :raises Unavailable: it is not installed.
    :raises BuildFailed: it failed.
    """
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except OSError as err:
        raise Unavailable(f"{command[0]}: {err.strerror}") from err
    if done.returncode:
        raise BuildFailed(f"{Path(command[0]).name} failed ({done.returncode}): {done.stderr.strip()}")
    return done.stdout


def built(name: str, sources: Sequence[Path | str], make: Callable[[Path], None]) -> Path:
    """
    The file or directory that ``make`` makes from ``sources``, made now if it has not been before.

    :param name: of the result, with its suffix.
    :param sources: files, whose contents count, and strings.
    :param make: called with the path to write to.
    """
    digest = hashlib.sha256()
    for source in sources:
        content = source.read_bytes() if isinstance(source, Path) else source.encode()
        digest.update(b"%d\n" % len(content) + content)
    wanted = _GUESTS / f"{Path(name).stem}-{digest.hexdigest()[:16]}{Path(name).suffix}"
    if not wanted.exists():
        _GUESTS.mkdir(parents=True, exist_ok=True)
        with open(_GUESTS / f"{name}.lock", "w", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not wanted.exists():
                with tempfile.TemporaryDirectory(dir=_GUESTS) as scratch:
                    made = Path(scratch) / name
                    make(made)
                    os.rename(made, wanted)
    return wanted


def firmware(name: str, source: Path, *defines: str) -> Path:
    """
    An image for ``-bios`` in assembly, which may include ``*.inc`` of its directory.

    :param name: of the result, with its suffix.
    :param defines: names of macros.
    :raises Unavailable: no assembler.
    :raises BuildFailed: the source is wrong.
    """
    options = [f"-D{name}" for name in defines]

    def assemble(image: Path) -> None:
        unlinked = image.with_suffix(".o")
        run(["gcc", "-m32", *options, "-c", "-o", unlinked, source])
        run(["ld", "-m", "elf_i386", "-Ttext", "0", "--entry", "0", "--oformat", "binary", "-o", image, unlinked])

    return built(name, [source, *sorted(source.parent.glob("*.inc")), *options], assemble)


def fetch(command: Sequence[str | Path]) -> str:
    """
    Run a tool that downloads, and return what it prints.

    :raises Unavailable: it could not (exit status 1).
    :raises BuildFailed: what it downloaded is not as it should be.
    """
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode == 1:
        raise Unavailable((done.stderr.strip() or f"{command[0]} failed").splitlines()[-1])
    if done.returncode:
        raise BuildFailed(f"{Path(command[0]).name} failed ({done.returncode}): {done.stderr.strip()}")
    return done.stdout.strip()
