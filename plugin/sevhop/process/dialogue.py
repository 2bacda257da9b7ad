"""
What a program that is started for some questions is asked, and answers.

It may be any program: the wrong one that was named, or a QEMU that hangs. So its output is limited, and it has its
questions, of which the last is to quit, before it exists: it does not wait for them if this process is killed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import subprocess
import time
from collections.abc import Iterator

#: Bytes; a QEMU answers with less than a hundredth of that.
_LIMIT = 16 << 20
_CHUNK = 1 << 16


class TooMuchOutput(subprocess.SubprocessError):
    """A program has printed more than any answer can be."""

    def __init__(self) -> None:
        super().__init__(f"it prints more than {_LIMIT >> 20} MiB")


@contextlib.contextmanager
def questions(text: bytes) -> Iterator[int]:
    """
    A descriptor for the standard input of a program: the text, and its end.

    :param text: no longer than a pipe is by default, 64 KiB.
    :raises OSError: it is longer, or there are no more descriptors.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            os.set_blocking(writer, False)
            if os.write(writer, text) < len(text):
                raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        finally:
            os.close(writer)
        yield reader
    finally:
        os.close(reader)


def answers(program: subprocess.Popen[bytes], timeout: float) -> tuple[bytes, bytes]:
    """
    What a program prints to its standard output and standard error, both of which are pipes, until it ends.

    :param timeout: seconds.
    :raises subprocess.TimeoutExpired: it has not ended by then.
    :raises TooMuchOutput: it prints without end.
    """
    assert program.stdout is not None and program.stderr is not None
    deadline = time.monotonic() + timeout
    printed: dict[int, bytearray] = {file.fileno(): bytearray() for file in (program.stdout, program.stderr)}
    with selectors.DefaultSelector() as selector:
        for number in printed:
            selector.register(number, selectors.EVENT_READ)
        while selector.get_map():
            if not (ready := selector.select(max(deadline - time.monotonic(), 0.0))):
                raise subprocess.TimeoutExpired(program.args, timeout)
            for key, _ in ready:
                if data := os.read(key.fd, _CHUNK):
                    printed[key.fd] += data
                else:
                    selector.unregister(key.fd)
            if sum(map(len, printed.values())) > _LIMIT:
                raise TooMuchOutput
    program.wait(max(deadline - time.monotonic(), 0.0))
    output, errors = map(bytes, printed.values())
    return output, errors
