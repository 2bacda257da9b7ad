"""
``sevhop hop``: what it calls, and what it prints.

The emulator is probed while what a hop needs is imported: both take about as long. So this module imports little.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import socket
import threading
from collections.abc import Iterator

from sevhop_qmp import peer
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess, path_on_disk

from ..guest import preload
from . import terminal

#: How the greeting of a QMP monitor begins, and the milliseconds that it may take here: usually less than one.
_GREETING = b'{"QMP"'
_PATIENCE_MS = 50


def run(options: argparse.Namespace) -> int:
    """The command. :return: its exit status."""
    with _probing(options) as connection:
        return _hop(options, connection)


@contextlib.contextmanager
def _probing(options: argparse.Namespace) -> Iterator[socket.socket | None]:
    """
    Meanwhile the emulator is probed. Whether that fails is for the check to report: it gets the result from
    :mod:`sevhop.guest.preload`, or probes again.

    :return: a connection to the guest's QEMU, which is known by it; None if that cannot be reached.
    """
    connection = peer.open_socket()
    try:
        connection.connect(os.fspath(options.qmp))
    except OSError:  # the check connects, and waits if it has to
        connection.close()
        yield None
        return
    if not _greets(connection):
        yield connection
        return
    probe = threading.Thread(target=_probe, args=(options, peer.peer_credentials(connection)[0]), name="probe")
    probe.start()
    try:
        yield connection
    except KeyboardInterrupt:
        preload.abandon()
        raise
    finally:
        probe.join()


def _greets(connection: socket.socket) -> bool:
    """
    Whether it is a QEMU that will talk to us, as far as can be seen at once: by default its program is started.
    Nothing is taken from the connection.
    """
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    if not poll.poll(_PATIENCE_MS):
        return False
    try:
        return connection.recv(len(_GREETING), socket.MSG_PEEK) == _GREETING
    except OSError:
        return False


def _probe(options: argparse.Namespace, pid: int) -> None:
    with contextlib.suppress(Exception):  # whatever it is, the check finds it as well
        process = QemuProcess.open(pid)
        try:
            named = options.destination[0] if options.destination else options.emulator
            preload.probe_for(process, named or path_on_disk(process.executable))
        finally:
            process.close()


def _hop(options: argparse.Namespace, connection: socket.socket | None) -> int:
    with terminal.deferred_interrupts():
        from .. import api
        from ..options import HopOptions
        from . import interruptible
        from .outcomes import Outcomes, add_metrics, shown_progress
        from .output import fail

    with shown_progress(options) as progress:
        outcomes = Outcomes(options, progress)
        try:
            interruptible.run(
                api.hop(
                    options.qmp,
                    HopOptions(
                        emulator=options.emulator,
                        command=options.destination or None,
                        step_timeout=options.timeout,
                        start_timeout=options.start_timeout,
                        move_deadline=options.move_deadline,
                    ),
                    connection=connection,
                    listener=outcomes,
                ),
                interrupted=preload.abandon,  # when the check is over nothing is probed
            )
        except SevhopError:
            if not outcomes.reports:
                raise
    if not outcomes.reports:
        return fail(options, "interrupted")
    add_metrics(options, outcomes.reports.values())
    if options.json:
        (report,) = outcomes.reports.values()
        print(json.dumps(report.as_json()))
    return outcomes.status
