"""
The keeper's checkpoints, as the keeper sees them: the last one of its predecessor, and where it stores its own.

This is what the file descriptor store of systemd does for its services (sd_pid_notify_with_fds(3)). The other end is in
:mod:`sevhop.keeper.supervisor`.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any


class FdStore:
    """
    The keeper's side: the last checkpoint of its predecessor, and where it stores its own.

    :ivar record: what was stored last; empty for the first keeper.
    :ivar descriptors: by name, those that were stored with it.
    """

    def __init__(
        self, record: dict[str, Any], descriptors: dict[str, int], supervisor: socket.socket | None = None
    ) -> None:
        self.record = record
        self.descriptors = descriptors
        self._supervisor = supervisor

    def store(self, record: Mapping[str, Any], descriptors: Mapping[str, int], *, needed: bool) -> None:
        """
        Replace what is stored. Without a supervisor nothing happens.

        :param needed: whether the guest exists nowhere else.
        """
        if self._supervisor is None:
            return
        text = json.dumps({"record": record, "names": list(descriptors), "needed": needed})
        try:
            socket.send_fds(self._supervisor, [text.encode()], list(descriptors.values()))
        except OSError:
            # It has died. This process has everything as well.
            self._supervisor.close()
            self._supervisor = None
