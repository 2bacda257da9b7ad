"""
The terminal, or the pipe, that a command was started from. It may go away, or stand still, and a guest must not.

The signals of a session that ends are those of somebody who asks for the hop to be undone; the one that would stop the
command, and with it perhaps the guest, does nothing. What is printed is written by a thread of its own: nobody waits
for a terminal that takes nothing (Ctrl-S, a connection that has dropped), and what cannot be written is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TextIO, cast

#: What asks for an end.
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)


def handle_signals(interrupt: Callable[[], object], *, hangup: bool = True) -> None:
    """
    From now on, in the running event loop, a signal does not end or stop this process. What it executes has the default
    actions.

    :param interrupt: called instead of being ended.
    :param hangup: whether SIGHUP asks for an end, too. Who has started us by nohup(1) does not want that either.
    """
    loop = asyncio.get_running_loop()
    for number in _ENDS:
        loop.add_signal_handler(number, interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        loop.add_signal_handler(signal.SIGHUP, interrupt if hangup else _nothing)
    loop.add_signal_handler(signal.SIGTSTP, _nothing)


def _nothing() -> None:
    pass


class _Writer:
    """Writes to files in the order in which it was told to, and never complains."""

    def __init__(self) -> None:
        self._texts: queue.SimpleQueue[tuple[TextIO, str] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="output", daemon=True)
        self._ended = False
        self._thread.start()

    def write(self, file: TextIO, text: str) -> None:
        if self._ended:
            _write(file, text)
        else:
            self._texts.put((file, text))

    def end(self) -> None:
        """Wait until all of it is written. From now on it is written at once."""
        self._texts.put(None)
        self._thread.join()
        self._ended = True

    def _work(self) -> None:
        # A terminal would stop all of a process in the background that writes to it (stty tostop).
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
        while (item := self._texts.get()) is not None:
            _write(*item)


def _write(file: TextIO, text: str) -> None:
    try:
        try:
            file.write(text)
        except UnicodeEncodeError as err:
            file.write(text.encode(err.encoding, "backslashreplace").decode(err.encoding))
        _flush(file)
    except (OSError, ValueError):
        # Nobody is there to be told, and Python would try once more when it exits, and change our exit status.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            os.dup2(null, file.fileno())
            os.close(null)


def _flush(file: TextIO) -> None:
    while True:
        try:
            file.flush()
            return
        except BlockingIOError:  # somebody whom we share it with has made it so
            select.select([], [file], [])


class _Output:
    """A file as others see it, whose text goes through a :class:`_Writer`."""

    def __init__(self, file: TextIO, writer: _Writer) -> None:
        self._file = file
        self._writer = writer

    def write(self, text: str) -> int:
        self._writer.write(self._file, text)
        return len(text)

    def flush(self) -> None:
        """That is done after each text."""

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


@contextlib.contextmanager
def patient_output() -> Iterator[None]:
    """Meanwhile, writing to standard output and standard error does not wait, and does not fail."""
    writer = _Writer()
    files = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Output(file, writer)) for file in files)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = files
        writer.end()
