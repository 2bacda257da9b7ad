"""
Records for the journal of systemd, by its native protocol (https://systemd.io/JOURNAL_NATIVE_PROTOCOL/).

======================  ==========================================================================================
``MESSAGE_ID``          :data:`PHASE` for a phase that is over, :data:`OUTCOME` for a hop that is, :data:`RECOVERY` for
                        an interrupted one that was recovered, or could not be
``SEVHOP_GUEST``        the guest: a domain, or the path of a QMP socket
``SEVHOP_PHASE``        the phase; only with :data:`PHASE`
``SEVHOP_OUTCOME``      the outcome of the hop; only with :data:`OUTCOME`
``SEVHOP_RESULT``       the result of the recovery; only with :data:`RECOVERY`
``SEVHOP_MS``           milliseconds: of the phase, or of the downtime, if there was one
======================  ==========================================================================================

So ``journalctl MESSAGE_ID=... SEVHOP_GUEST=web1`` finds them. Without a journal nothing is written. A busy one is not
waited for during a hop: the record is queued and sent with the next one, or at the end, when there is time to wait.
(systemd's own Python package would need a compiler and its headers on every host, for these lines.)
"""

from __future__ import annotations

import collections
import errno
import logging
import socket
import struct
import syslog
from pathlib import Path

from ..events import Event, HopFinished, PhaseEnded

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..engine.recovery_result import RecoveredGuest

#: Where systemd-journald listens.
SOCKET = Path("/run/systemd/journal/socket")
#: A phase is over.
PHASE = "089898dfeb824b40b4faba06382c02b9"
#: A hop is over.
OUTCOME = "8c22f705ac624006b73beded23242774"
#: An interrupted hop was recovered, or could not be.
RECOVERY = "fb48435b6ce94e50879d7535e81a9777"

#: Records that are queued for a busy journal, at most; of more the oldest are dropped.
_MAX_UNSENT = 10_000
#: Seconds to wait for a busy journal at the end, for each record.
_SEND_TIMEOUT = 1.0

log = logging.getLogger(__name__)

_PRIORITY = {
    "refused": syslog.LOG_WARNING,
    "rolled-back": syslog.LOG_ERR,
    "recovery-required": syslog.LOG_CRIT,
    "guest-lost": syslog.LOG_CRIT,
}


#: Those results of a recovery of which there is a record: in the others nothing was tried.
_PRIORITY_OF_RESULT = {
    "source": syslog.LOG_NOTICE,
    "destination": syslog.LOG_NOTICE,
    "saved": syslog.LOG_WARNING,
    "discarded": syslog.LOG_WARNING,
    "manual": syslog.LOG_CRIT,
    "gone": syslog.LOG_CRIT,
}


class Records:
    """A listener that writes a record for each phase and each hop that is over."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._unsent: collections.deque[bytes] = collections.deque(maxlen=_MAX_UNSENT)

    def __call__(self, event: Event) -> None:
        if isinstance(event, PhaseEnded):
            self._write(
                PRIORITY=syslog.LOG_INFO,
                MESSAGE=f"{event.guest}: {event.phase} took {event.ms:.1f} ms",
                MESSAGE_ID=PHASE,
                SEVHOP_GUEST=event.guest,
                SEVHOP_PHASE=event.phase,
                SEVHOP_MS=f"{event.ms:.3f}",
            )
        elif isinstance(event, HopFinished):
            report = event.report
            fields = {} if report.downtime_ms is None else {"SEVHOP_MS": f"{report.downtime_ms:.3f}"}
            self._write(
                PRIORITY=_PRIORITY.get(report.outcome, syslog.LOG_NOTICE),
                MESSAGE=str(report),
                MESSAGE_ID=OUTCOME,
                SEVHOP_GUEST=event.guest,
                SEVHOP_OUTCOME=report.outcome,
                **fields,
            )

    def recovered(self, guest: RecoveredGuest) -> None:
        """Write a record for a guest whose hop was recovered, or could not be."""
        if (priority := _PRIORITY_OF_RESULT.get(guest.name)) is not None:
            fields = {} if guest.stopped_ms is None else {"SEVHOP_MS": f"{guest.stopped_ms:.3f}"}
            self._write(
                PRIORITY=priority,
                MESSAGE=str(guest),
                MESSAGE_ID=RECOVERY,
                SEVHOP_GUEST=guest.guest,
                SEVHOP_RESULT=guest.name,
                **fields,
            )

    def _write(self, **fields: str | int) -> None:
        self._unsent.append(encoded(SYSLOG_IDENTIFIER="sevhop", **fields))
        self._send()

    @property
    def unsent(self) -> int:
        """The number of records queued for a busy journal."""
        return len(self._unsent)

    def _send(self) -> None:
        """Send the queued records in their order, as far as the journal takes them without blocking."""
        while self._unsent:
            try:
                self._socket.sendto(self._unsent[0], str(SOCKET))
            except (BlockingIOError, InterruptedError):
                return
            except OSError as err:
                if err.errno == errno.ENOBUFS:
                    return
                # There is no journal, or it rejects this record.
            self._unsent.popleft()

    def close(self) -> None:
        """Send the queued records, waiting for the journal, but not for long."""
        if self._unsent:
            # Python's own timeout would poll(), for which an unconnected datagram socket is always writable.
            self._socket.setblocking(True)
            limit = struct.pack("@ll", int(_SEND_TIMEOUT), int(_SEND_TIMEOUT % 1 * 1e6))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            self._send()
        if self._unsent:
            log.warning("systemd's journal is busy: %d records were not written", self.unsent)
        self._socket.close()


def encoded(**fields: str | int) -> bytes:
    """A record. Its values may contain newlines."""
    record = b""
    for name, value in fields.items():
        data = str(value).encode(errors="backslashreplace")
        if b"\n" in data:
            record += name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
        else:
            record += name.encode() + b"=" + data + b"\n"
    return record
