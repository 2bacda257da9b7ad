"""
Queries of block nodes that report dirty bitmaps. QEMU reads those from the image, which fails while it reopens that
read-write (EBADF, seen with QEMU 7.2 that loads): such a query is repeated.
"""

from __future__ import annotations

from typing import Any

import tenacity
from sevhop_qmp.errors import CommandError
from sevhop_qmp.monitor import Commands

#: How often what changes for a moment is read, and the seconds in between: 0.05, then 0.1.
STOP = tenacity.stop_after_attempt(3)
WAIT = tenacity.wait_incrementing(start=0.05, increment=0.05)

_retry = tenacity.retry(retry=tenacity.retry_if_exception_type(CommandError), wait=WAIT, stop=STOP, reraise=True)


@_retry
async def query_block(monitor: Commands) -> list[dict[str, Any]]:
    """
    The drives.

    :raises CommandError: QEMU refuses, every time.
    :raises MonitorError: QEMU does not answer.
    """
    rows: list[dict[str, Any]] = await monitor.execute("query-block")
    return rows


@_retry
async def query_named_block_nodes(monitor: Commands) -> list[dict[str, Any]]:
    """
    The block nodes, each once.

    :raises CommandError: QEMU refuses, every time.
    :raises MonitorError: QEMU does not answer.
    """
    rows: list[dict[str, Any]] = await monitor.execute("query-named-block-nodes", {"flat": True})
    return rows
