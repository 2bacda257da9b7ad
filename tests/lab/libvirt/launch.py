"""The launch of an encrypted domain, as it is reported."""

from __future__ import annotations

import base64
from typing import Any

from tests.support.guests.daemon import DomainGuest


def launch_of(guest: DomainGuest) -> dict[str, Any]:
    """What the owner of a guest can ask about its launch."""
    nonce = base64.b64encode(bytes(16)).decode()
    sev = guest.monitor("query-sev")["return"]
    sev.pop("sev-type", None)  # newer versions have this besides
    return {
        "domlaunchsecinfo": guest.daemon.virsh("domlaunchsecinfo", guest.name),
        "query-sev": sev,
        "measurement": guest.monitor("query-sev-launch-measure")["return"],
        "report": guest.monitor("query-sev-attestation-report", mnonce=nonce)["return"],
    }
