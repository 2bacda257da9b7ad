"""
The image files of a guest, by what its QEMU process has open.

A path may lead to another file than the one that QEMU has open: an image may have been replaced or renamed since. So
the images of source and destination are compared by device and inode.
"""

from __future__ import annotations

from collections.abc import Mapping

import tenacity
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.monitor import Commands
from sevhop_qmp.open_images import Identity, OpenFiles, identity_at
from sevhop_qmp.process import QemuProcess

from ..guest.block_queries import STOP, WAIT
from .block_graph import FILE_DRIVERS, BlockGraph, Node, read
from .comparison import changes


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
            return [f"{where} is not open in the new QEMU" for where in theirs.misplaced] + [
                f"{graph.disk_of(name)}: {graph.nodes[name].filename} is not the file that the old QEMU has open"
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
    first = graph = await read(monitor)
    images = Images(first, process)
    unlike = set(images.identities)

    # The file system reports another allocation from time to time, while the guest writes to the image.
    @tenacity.retry(retry=tenacity.retry_if_result(bool), wait=WAIT, stop=STOP, retry_error_callback=lambda _: None)
    async def compare_allocations() -> bool:
        nonlocal graph
        before = images.allocated()
        graph = await read(monitor)
        after = images.allocated()
        if changed := changes(first, graph):
            raise SevhopError(f"{changed} was changed by another client", "try again")
        known = images.identities
        unlike.difference_update({name for name in unlike if _between(graph.nodes[name], before, after, known[name])})
        return bool(unlike)

    try:
        await compare_allocations()
    except BaseException:
        images.close()
        raise
    # Two files whose names were swapped are both open. QEMU reports the allocation of the file that the node has.
    images.misplaced += [f"{graph.disk_of(name)}: {graph.nodes[name].filename}" for name in sorted(unlike)]
    return graph, images


def _between(node: Node, before: Mapping[Identity, int], after: Mapping[Identity, int], identity: Identity) -> bool:
    """Whether the allocation that QEMU has reported is what the file had at that time."""

    if node.allocated is None or identity not in before or identity not in after:
        return True
    low, high = sorted((before[identity], after[identity]))
    return low <= node.allocated <= high
