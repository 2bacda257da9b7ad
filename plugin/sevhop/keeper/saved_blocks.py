"""The RAM blocks that were private to the source, which is gone: saved before, written into the destination."""

from __future__ import annotations

import os

from sevhop_qmp import ram_block_sync, saved_ram_blocks
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.ram_block_sync import RamBlockCopy
from sevhop_qmp.ram_blocks import RamBlock, private_pairs

from .config import KeeperConfig

_NAME = "saved blocks"


class SavedBlocks:
    """Copies of those blocks, in a memfd that outlives the keeper."""

    def __init__(self, config: KeeperConfig) -> None:
        self._source = {block.name: block for block in config.blocks}
        self._encrypted = frozenset(config.encrypted)
        self.copies: dict[str, RamBlockCopy] = {}
        self._fd: int | None = None

    @property
    def _to_save(self) -> list[RamBlock]:
        return [block for name, block in self._source.items() if name not in self._encrypted]

    def descriptors(self) -> dict[str, int]:
        """For a checkpoint."""
        return {} if self._fd is None else {_NAME: self._fd}

    def restore(self, descriptors: dict[str, int]) -> None:
        """
        Take from a checkpoint what belongs here.

        :raises RamError: the copies cannot be read.
        """
        self._fd = descriptors.pop(_NAME, None)
        if self._fd is not None:
            self.copies = saved_ram_blocks.unpack(self._fd, self._to_save)

    def take(self, source: QemuProcess) -> None:
        """
        Copy the blocks of the stopped source.

        :raises RamError: a block cannot be copied.
        """
        self.copies = saved_ram_blocks.copy(source, self._to_save)
        if self._fd is not None:
            os.close(self._fd)
        self._fd = saved_ram_blocks.pack(self.copies.values())

    def write(self, destination: QemuProcess, blocks: dict[str, RamBlock]) -> None:
        """
        Write the copies into a destination that does not run.

        :param blocks: the destination's.
        :raises RamError: it has other blocks, or one could not be written.
        """
        pairs = private_pairs(self._source, blocks, encrypted=self._encrypted)
        ram_block_sync.write(((self.copies[theirs.name], ours) for theirs, ours in pairs), destination)
