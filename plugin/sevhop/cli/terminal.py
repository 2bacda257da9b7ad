"""
The terminal, or the pipe, of a command. It may close or block, and neither may stop a guest.

The signals that end a session request a rollback of the hop; SIGTSTP, which would stop the command, and with it perhaps
the guest, is ignored. Output is written by a thread of its own: nothing waits for a terminal that does not read
(Ctrl-S, a dropped connection), and what cannot be written is discarded.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import select
import signal
import sys
import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TextIO

#: Signals that request an interruption.
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)


def handle_signals(interrupt: Callable[[], object], *, hangup: bool = True) -> None:
    """
    From now on, in the running event loop, these signals do not terminate or stop this process. Its children get the
    default actions.

    :param interrupt: called instead.
    :param hangup: whether SIGHUP requests an interruption, too; it does not under nohup(1).
    """
    import asyncio  # which takes longer than --help may

    loop = asyncio.get_running_loop()
    for number in _INTERRUPTS:
        loop.add_signal_handler(number, interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        loop.add_signal_handler(signal.SIGHUP, interrupt if hangup else _nothing)
    loop.add_signal_handler(signal.SIGTSTP, _nothing)


def _nothing() -> None:
    pass


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[list[int]]:
    """
    Meanwhile the signals that request an interruption have no effect, but at the end: a module whose import is
    interrupted is not there for who reports that, and what was started meanwhile would be left.

    :return: those that were received so far; who takes note of them clears the list.
    :raises KeyboardInterrupt: at the end, if there are any.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    actions = {number: signal.getsignal(number) for number in (*_INTERRUPTS, signal.SIGHUP)}
    # SIGINT is ignored in the background of a script.
    before = {number: action for number, action in actions.items() if action not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, action in before.items():
            signal.signal(number, action)
    if received:
        raise KeyboardInterrupt


def ignore_interrupts() -> None:
    """From now on Ctrl-C is ignored: what a command has done to its guests is still to be reported."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def open_standard_files() -> None:
    """
    Open standard input, output and error if the command was started without them (``>&-``): whatever is opened next
    would get the number of one, and what is printed would be written to it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
    # Python has none for a number that was not open.
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False))


class _Writer:
    """
    Writes texts to files from a thread, in the order of the calls, and ignores errors.

    :ivar error: why something that was to be read was not written, unless nobody reads any more.
    """

    def __init__(self, output: TextIO) -> None:
        self.error: OSError | None = None
        self._output = output
        self._texts: queue.SimpleQueue[tuple[TextIO, str] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="output", daemon=True)
        self._closed = False
        self._thread.start()

    def write(self, file: TextIO, text: str) -> None:
        if self._closed:
            self._write(file, text)
        else:
            self._texts.put((file, text))

    def close(self) -> None:
        """Wait until all of it is written. Later texts are written directly."""
        self._texts.put(None)
        self._thread.join()
        self._closed = True

    def _work(self) -> None:
        # A terminal with "stty tostop" stops a background process that writes to it, with all its threads.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
        while (item := self._texts.get()) is not None:
            self._write(*item)

    def _write(self, file: TextIO, text: str) -> None:
        error = _write(file, text)
        if error is not None and error.errno != errno.EPIPE and file is self._output and self.error is None:
            self.error = error


def _write(file: TextIO, text: str) -> OSError | None:
    """:return: why it was not written."""
    try:
        try:
            file.write(text)
        except UnicodeEncodeError as err:
            file.write(text.encode(err.encoding, "backslashreplace").decode(err.encoding))
        _flush(file)
    except (OSError, ValueError) as err:
        # There is nowhere to report it, and Python would flush again at exit, and change our exit status.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            os.dup2(null, file.fileno())
            os.close(null)
        return err if isinstance(err, OSError) else None
    return None


def _flush(file: TextIO) -> None:
    while True:
        try:
            file.flush()
            return
        except BlockingIOError:  # a process that shares the file has set O_NONBLOCK
            poll = select.poll()
            poll.register(file, select.POLLOUT)
            poll.poll()


class _Output:
    """Stands in for a file; what is written to it goes through a :class:`_Writer`."""

    def __init__(self, file: TextIO, writer: _Writer) -> None:
        self._file = file
        self._writer = writer

    def write(self, text: str) -> int:
        self._writer.write(self._file, text)
        return len(text)

    def flush(self) -> None:
        """Nothing to do: the writer flushes after each text."""

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


@contextlib.contextmanager
def nonblocking_output() -> Iterator[_Writer]:
    """
    Meanwhile, writing to standard output and standard error does not block, and does not fail.

    :return: what writes; afterwards it has the error of standard output.
    """
    writer = _Writer(sys.stdout)
    files = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Output(file, writer) for file in files)
    try:
        yield writer
    finally:
        sys.stdout, sys.stderr = files
        writer.close()
