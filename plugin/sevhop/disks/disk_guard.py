"""
Guards the disks of a guest that hops: what was compared before the guest stops has not changed when it has stopped,
and the source has given up its images before the destination activates them.

Before the stop QEMU is queried. Afterwards it is not, since every query costs some tenths of a millisecond of downtime:
what a process has open, and which locks it holds, is known from the kernel.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Self

from sevhop_qmp.errors import ProcessError, SevhopError, StateError
from sevhop_qmp.image_locks import ImageLocks
from sevhop_qmp.monitor import Commands
from sevhop_qmp.open_images import Identity
from sevhop_qmp.process import QemuProcess

from . import block_graph, comparison
from .block_graph import BlockGraph, Node
from .images import Images, open_images

#: Seconds within which a source that closes its images should have exited, if that is why.
_EXIT = 0.1
#: What to do about a disk that is not released.
_KEPT_HINT = "find the job or export that uses it, then try again"
#: Drivers that store nothing.
_NOTHING = frozenset({"null-aio", "null-co"})


class DiskGuard:
    """
    The disks of a source. Use :meth:`open`.

    :ivar graph: as it was read.
    :ivar spares_given_up: whether a rollback must activate nodes that no device uses (:func:`.block_graph.activate`).
    """

    def __init__(self, process: QemuProcess, graph: BlockGraph, images: Images, locks: ImageLocks) -> None:
        self._process = process
        self.graph = graph
        self._images = images
        self._locks = locks
        self._used = graph.used()
        self.spares_given_up = False

    @classmethod
    async def open(cls, monitor: Commands, process: QemuProcess) -> Self:
        """
        Read the disks of a source.

        :raises SevhopError: they cannot be read, or a path does not lead to the image that is open.
        """
        graph, images = await open_images(monitor, process)
        try:
            if images.misplaced:
                raise SevhopError(
                    f"{images.misplaced[0]} is not the file that the guest has open", "put the guest's file back there"
                )
            return cls(process, graph, images, ImageLocks.of(process))
        except BaseException:
            images.close()
            raise

    def close(self) -> None:
        """Release the images."""
        self._images.close()
        self._locks.close()

    async def differences(self, monitor: Commands, process: QemuProcess, *, names: bool) -> list[str]:
        """
        How the disks of a destination differ from these; empty when it may have the guest.

        :param names: whether the names of block nodes matter.
        """
        theirs = await block_graph.read(monitor)
        return comparison.differences(self.graph, theirs, names=names) or self._images.others_of(theirs, process)

    async def verify_unchanged(self, monitor: Commands) -> None:
        """
        While the guest still runs.

        :raises SevhopError: somebody has changed the disks.
        """
        if found := comparison.changes(self.graph, await block_graph.read(monitor)):
            raise SevhopError(f"{found} was changed by another client", "try again")
        self._images.files.refresh()
        self._raise_for(set(self._images.identities.values()) - self._images.files.identities)

    async def verify_unchanged_when_stopped(self) -> None:
        """
        The same when the guest has stopped, without a query to its QEMU. One that has exited, now that its state is
        saved, is not needed any more, and has no images.

        :raises SevhopError: an image was opened or closed meanwhile.
        """
        try:
            changed = self._images.files.changed(quick=True)
        except ProcessError:
            changed = set()
        # One that is about to exit closes them all.
        if changed and not await self._process.wait(_EXIT):
            self._raise_for(changed)

    def _raise_for(self, changed: set[Identity]) -> None:
        for identity in changed:
            names = [name for name, known in self._images.identities.items() if known == identity]
            where = self.graph.disk_of(names[0]) if names else self._images.files.path(identity) or "a disk"
            raise SevhopError(f"{where} was changed by another client", "try again")

    async def verify_given_up(
        self, monitor: Commands, *, again: bool, verify_stopped: Callable[[], Awaitable[None]]
    ) -> None:
        """
        When the source has saved its state, verify that it has given up all images that it could write to.

        :param again: whether it must be commanded to. A QEMU whose images were activated without its guest being
            resumed believes that it does not have them (QEMU 10: ``migration_block_inactivate``).
        :param verify_stopped: awaited before it is commanded to give up any: a QEMU whose guest somebody has resumed
            aborts when that writes to one.
        :raises StateError: it has not. The destination must not have them.
        """
        if again and self._process.alive:
            await verify_stopped()
            await block_graph.inactivate(monitor)
        if self._locks.kept() and self._process.alive:
            await verify_stopped()
            await self._give_up_spares(monitor)
        if kept := self._locks.kept():
            names = [name for name, known in self._images.identities.items() if known in kept]
            where = self.graph.disk_of(names[0]) if names else "a disk"
            raise StateError(f"the old QEMU has not released {where}", _KEPT_HINT)
        # One that has exited, now that its state is saved, has none.
        if any(self._unlocked(self.graph.nodes[name]) for name in self._used) and self._process.alive:
            graph = await block_graph.read(monitor)
            for node in (graph.nodes[name] for name in graph.used()):
                if node.active and not node.read_only:
                    raise StateError(f"the old QEMU has not released {graph.disk_of(node.name)}", _KEPT_HINT)

    def verify_not_resumed(self) -> None:
        """
        When the source is halted: whoever has resumed its guest has activated its images, with their locks. Nothing is
        known of a guest whose images are not locked.

        :raises StateError: somebody has.
        """
        if self._locks.kept() and self._process.alive:
            raise StateError("another client has resumed the guest", "stop that client, then try again")

    async def _give_up_spares(self, monitor: Commands) -> None:
        """
        QEMU 10 keeps some of those nodes that no device uses active, with their locks. What is below one is given up
        with it, even if a device writes to it, and then QEMU aborts (``bdrv_co_write_req_prepare``): so this is not
        done before the guest has stopped.
        """
        self.spares_given_up = True
        for name in self.graph.spare():
            if self.graph.nodes[name].active:
                await monitor.execute("blockdev-set-active", {"node-name": name, "active": False})

    async def lost_bitmaps(self, monitor: Commands) -> list[str]:
        """
        Which dirty bitmaps are missing in a QEMU that has the images now: a backup must not rely on them.

        :return: a sentence for each.
        """
        before = self.graph.bitmaps()
        if not before:
            return []
        try:
            lost = before.keys() - (await block_graph.read(monitor)).bitmaps().keys()
        except SevhopError as err:
            return [f"cannot check the dirty bitmaps: {err.message}"]
        return [f"{before[key]} cannot be used any more: the next backup must be a full one" for key in sorted(lost)]

    def _unlocked(self, node: Node) -> bool:
        """
        Whether QEMU must be queried whether a node is active: one that may be written to, without a lock. libvirt
        leaves it to QEMU whether it opens a firmware for writing (``auto-read-only``), and QEMU does not.
        """
        if node.active is None or node.read_only or node.children or node.driver in _NOTHING:
            return False
        identity = self._images.identities.get(node.name)
        return identity is None or (identity not in self._locks.locked and self._images.files.writable(identity))
