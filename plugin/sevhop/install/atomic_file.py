"""A file that ``sevhop install`` puts on the host: there as a whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from sevhop_qmp.errors import SevhopError


def write(path: Path, text: str, mode: int, *, beside: Path) -> None:
    """
    Write it, or exchange the one that is there.

    :param beside: where it is written at first: a directory of the same file system, in which nobody takes it for what
        it is going to be.
    :raises SevhopError: it cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=beside, prefix=".sevhop-", delete=False) as file:
            file.write(text)
        os.chmod(file.name, mode)
        os.replace(file.name, path)
    except OSError as err:
        raise SevhopError(f"{path} cannot be written: {err.strerror}", "run sevhop as root") from err
