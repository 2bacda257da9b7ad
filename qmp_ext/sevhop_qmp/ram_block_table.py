"""The table that the HMP command ``info ramblock`` prints. It has host addresses since QEMU 8."""

from __future__ import annotations

from typing import NamedTuple

from .errors import RamError

#: For a QEMU whose RAM blocks are not understood.
UNKNOWN_HINT = "report this, with QEMU's version and the output of its HMP command info ramblock"


class Row(NamedTuple):
    """A line of ``info ramblock``."""

    name: str
    offset: int
    used: int
    size: int
    host: int | None


def parse_ramblock_table(text: str) -> list[Row]:
    """
    Read the table that the HMP command ``info ramblock`` prints.

    :raises RamError: it is not such a table.
    """
    lines = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    if not lines or not lines[0].split()[:2] == ["Block", "Name"]:
        raise RamError("cannot read QEMU's list of RAM blocks: unknown form", UNKNOWN_HINT)
    with_host = "HVA" in lines[0]
    rows = []
    for line in lines[1:]:
        # The name may contain blanks; the columns after it do not, but for the page size ("4 KiB").
        columns = 6 if not with_host else 8 if lines[0].split()[-1] == "RO" else 7
        words = line.rsplit(None, columns - 1)
        if len(words) == columns - 1:
            continue  # a block without a name belongs to a backend that the guest does not use
        try:
            numbers = [int(word, 16) for word in words[3 : 7 if with_host else 6]]
            if not 0 <= numbers[1] <= numbers[2] < 1 << 64 or max(numbers) >= 1 << 64 or min(numbers) < 0:
                raise ValueError("no process has such a block")
            rows.append(Row(words[0].strip(), numbers[0], numbers[1], numbers[2], numbers[3] if with_host else None))
        except (ValueError, IndexError) as err:
            raise RamError(
                f"cannot read QEMU's list of RAM blocks: unknown line: {line.strip()}", UNKNOWN_HINT
            ) from err
    return rows
