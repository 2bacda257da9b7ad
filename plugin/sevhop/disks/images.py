"""
The image files of a guest, by what its QEMU process has open.

A path may lead to another file than the one that QEMU has open: an image may have been replaced or renamed since. So
the images of source and destination are compared by device and inode.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.monitor import Commands
from sevhop_qmp.open_images import Identity, OpenFiles, identity_at
from sevhop_qmp.process import QemuProcess

from .block_graph import FILE_DRIVERS, BlockGraph, Node, changes, read

#: How often graph and files are read when they contradict each other.
_ATTEMPTS = 3
#: Seconds before the second attempt, and twice that before the third.
_PAUSE = 0.05


class Images:
    """
    The image files of one QEMU, by what it has open.

    :ivar files: what it has open.
    :ivar identities: name of a node → its file.
    :ivar misplaced: nodes whose path does not lead to a file that is open, each with its disk and path.
    """

    def __init__(self, graph: BlockGraph, process: QemuProcess) -> None:
        """:raises ProcessError: the process has exited, or access is denied."""
        self.files = OpenFiles(process)
        self.identities: dict[str, Identity] = {}
        self.misplaced: list[str] = []
        self._process = process
        for node in graph.nodes.values():
            if node.driver not in FILE_DRIVERS:
                continue
            identity = identity_at(process, node.filename)
            if identity is None or identity not in self.files.identities:
                self.misplaced.append(f"{graph.disk_of(node.name)}: {node.filename}")
            else:
                self.identities[node.name] = identity

    def close(self) -> None:
        """Release the process."""
        self.files.close()

    def others_of(self, graph: BlockGraph, process: QemuProcess) -> list[str]:
        """
        The images of a destination that are not these, each with the name of its disk.

        :param graph: the destination's.
        """
        theirs = Images(graph, process)
        try:
            ours = set(self.identities.values())
            return [f"{where} is not open in the destination" for where in theirs.misplaced] + [
                f"{graph.disk_of(name)}: {graph.nodes[name].filename} is not the file that the source has open"
                for name, identity in theirs.identities.items()
                if identity not in ours
            ]
        finally:
            theirs.close()

    def allocated(self) -> dict[Identity, int]:
        """Bytes that each file takes on the disk, now."""
        return self.files.allocated()


async def open_images(monitor: Commands, process: QemuProcess) -> tuple[BlockGraph, Images]:
    """
    Read the present graph, and find its images among what the process has open.

    :raises SevhopError: QEMU does not answer, has exited, or its disks keep changing.
    """
    first = await read(monitor)
    images = Images(first, process)
    try:
        unlike = set(images.identities)
        for attempt in range(_ATTEMPTS):
            # The file system reports another allocation from time to time, while the guest writes to the image.
            await asyncio.sleep(attempt * _PAUSE)
            before = images.allocated()
            graph = await read(monitor)
            after = images.allocated()
            if changed := changes(first, graph):
                raise SevhopError(f"{changed} was changed by another client", "try again")
            known = images.identities
            unlike = {name for name in unlike if not _between(graph.nodes[name], before, after, known[name])}
            if not unlike:
                break
        # Two files whose names were swapped are both open. QEMU reports the allocation of the file that the node has.
        images.misplaced += [f"{graph.disk_of(name)}: {graph.nodes[name].filename}" for name in sorted(unlike)]
    except BaseException:
        images.close()
        raise
    return graph, images


def _between(node: Node, before: Mapping[Identity, int], after: Mapping[Identity, int], identity: Identity) -> bool:
    """Whether the allocation that QEMU has reported is what the file had at that time."""

    if node.allocated is None or identity not in before or identity not in after:
        return True
    low, high = sorted((before[identity], after[identity]))
    return low <= node.allocated <= high
