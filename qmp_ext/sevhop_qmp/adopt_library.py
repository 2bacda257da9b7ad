"""
adopt.so, the library that is preloaded into a destination: where it is, and how a QEMU gets it.

Its commands are in :mod:`sevhop_qmp.adopt`, which needs a monitor, and with it asyncio.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .errors import SevhopError

#: The commands that the library adds, as ``query-commands`` lists them.
COMMANDS = (
    "x-sev-adopt-ram",
    "x-sev-migrate-from",
    "x-sev-adopt-status",
    "x-sev-adopt-announce",
    "x-sev-adopt-finish",
    "x-sev-reboot-mark",
)

_PRELOAD = "LD_PRELOAD"
_KEEPER = "SEVHOP_KEEPER"
_STDERR = "SEVHOP_STDERR"


def path() -> Path:
    """
    Path of adopt.so: in this package, or the target of a link there.

    :raises SevhopError: the package was not built (``pip install .`` builds it).
    """
    found = (Path(__file__).parent / "preload" / "adopt.so").resolve()
    if not found.is_file():
        raise SevhopError(f"{found} is missing", "install the package with a C compiler present")
    return found


def environment(
    keeper: Path | str, stderr: int | None = None, inherited: Mapping[str, str] | None = None
) -> dict[str, str]:
    """
    What the environment of a destination, and only of a destination, must have: the library removes it at once.

    :param keeper: path of the keeper's listening socket, or ``fd:N`` for a connected one that is inherited.
    :param stderr: inherited descriptor that becomes the destination's stderr when the hop is over.
    :param inherited: the environment that this is added to. Other libraries that it preloads stay preloaded.
    """
    added = {**preloading(inherited or {}), _KEEPER: str(keeper)}
    if stderr is not None:
        added[_STDERR] = str(stderr)
    return added


def preloading(inherited: Mapping[str, str]) -> dict[str, str]:
    """What only loads the library into a program: without a keeper it adds its commands, and adopts nothing."""
    others = inherited.get(_PRELOAD, "")
    return {_PRELOAD: f"{path()}:{others}" if others else str(path())}
