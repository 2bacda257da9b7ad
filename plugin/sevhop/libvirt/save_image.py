"""
libvirt's save image, the file of ``virsh save`` and ``virsh restore``: written and read.

::

    offset  0   LibvirtQemudSave
           16   five integers of 32 bits in the host's byte order: version (2), length of the XML block, whether the
                guest was running, compression (0: none, 1: gzip), offset of a cookie inside the XML block (0: none)
           36   56 zero bytes
           92   the XML block: the domain XML, NUL, perhaps a cookie; padded with NULs
            +   QEMU's migration stream

That is ``virQEMUSaveHeader`` in libvirt's src/qemu/qemu_saveimage.h. An image that sevhop writes has a stream without
RAM, which is in the keeper.

libvirt passes the image's descriptor to QEMU, with its offset at the stream. QEMU 11 does not load a stream from a
regular file that way. From a pipe it does, and libvirt uses a pipe for a compressed image, with gzip at its other end.
There is nothing to decompress, since the stream is stored in the gzip format.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from sevhop_qmp.errors import SevhopError

MAGIC = b"LibvirtQemudSave"
#: libvirt's magic of an image that is not complete yet.
PARTIAL_MAGIC = b"LibvirtQemudPart"
VERSION = 2
_RAW, _GZIP = 0, 1
#: For zlib: a gzip header, and the largest window.
_GZIP_WINDOW = 31
_HEADER = struct.Struct("=16s5I56s")
#: Padding that libvirt leaves after the XML, so that it can be edited in place (``virsh save-image-edit``).
_PADDING = 1024
#: The largest XML block that is read; domain XML has some kilobytes.
_XML_LIMIT = 16 << 20
#: The largest stream that is read; without RAM it has some hundred kilobytes.
STREAM_LIMIT = 1 << 30


class SaveImageError(SevhopError):
    """A file is not a save image that sevhop has written, or is damaged."""


@dataclass(frozen=True)
class SaveImage:
    """
    A save image.

    :ivar xml: the domain as it was running.
    :ivar running: whether the guest runs after the restore; otherwise it stays paused.
    :ivar stream: the migration stream, without RAM.
    :ivar piped: whether QEMU gets the stream through a pipe.
    """

    xml: str
    running: bool
    stream: bytes
    piped: bool = False

    def write(self, file: BinaryIO) -> None:
        """
        Write it to a file that is open at its start.

        :raises SaveImageError: the XML contains a NUL, or is not UTF-8.
        :raises OSError: the disk is full, or the like.
        """
        try:
            text = self.xml.encode()
        except UnicodeEncodeError as err:
            raise SaveImageError("domain XML is not UTF-8") from err
        if b"\0" in text:
            raise SaveImageError("domain XML contains a NUL")
        block = text + bytes(1 + _PADDING)
        compression = _GZIP if self.piped else _RAW
        file.write(_HEADER.pack(MAGIC, VERSION, len(block), self.running, compression, 0, b""))
        file.write(block)
        file.write(_stored(self.stream) if self.piped else self.stream)
        file.flush()

    @classmethod
    def read(cls, file: BinaryIO) -> SaveImage:
        """
        Read what :meth:`write` wrote; the XML may have been edited since. Lengths in the header are compared with
        the file's size before they are used.

        :raises SaveImageError: it is not such a file.
        """
        size = os.fstat(file.fileno()).st_size
        header = file.read(_HEADER.size)
        if len(header) != _HEADER.size:
            raise SaveImageError("the file is too short for a save image")
        magic, version, xml_length, running, compression, cookie, _ = _HEADER.unpack(header)
        if magic == PARTIAL_MAGIC:
            raise SaveImageError("the save image is incomplete")
        if magic != MAGIC:
            raise SaveImageError("the file is not a save image of libvirt")
        if version != VERSION:
            raise SaveImageError(f"save image version {version} is not supported, only {VERSION}")
        if compression not in (_RAW, _GZIP):
            raise SaveImageError("the save image is compressed in a format that sevhop does not use")
        if xml_length > min(_XML_LIMIT, size - _HEADER.size):
            raise SaveImageError(f"the save image claims {xml_length} bytes of XML, which it does not have")
        if cookie > xml_length:
            raise SaveImageError("the save image's cookie is beyond its XML")
        if size - _HEADER.size - xml_length > STREAM_LIMIT:
            raise SaveImageError("the save image contains RAM, so it was not written by sevhop")
        text, end, _ = file.read(xml_length).partition(b"\0")
        if not end:
            raise SaveImageError("the save image's XML has no end")
        stream = file.read()
        try:
            piped = compression == _GZIP
            return cls(text.decode(), bool(running), _unpacked(stream) if piped else stream, piped)
        except UnicodeDecodeError as err:
            raise SaveImageError("the save image's XML is not UTF-8") from err


def _stored(stream: bytes) -> bytes:
    """In the gzip format, without compression: that would take time."""
    packer = zlib.compressobj(level=0, wbits=_GZIP_WINDOW)
    return packer.compress(stream) + packer.flush()


def _unpacked(packed: bytes) -> bytes:
    unpacker = zlib.decompressobj(wbits=_GZIP_WINDOW)
    try:
        # Ours is not compressed; one that expands to gigabytes is not ours.
        stream = unpacker.decompress(packed, len(packed) + 1)
    except zlib.error as err:
        raise SaveImageError(f"the save image's stream is damaged: {err}") from err
    if not unpacker.eof or unpacker.unused_data:
        raise SaveImageError("the save image's stream is damaged: it is truncated, or followed by other data")
    return stream
