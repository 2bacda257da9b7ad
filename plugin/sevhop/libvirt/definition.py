"""
Changing the persistent definition of a domain: all of it at once, since libvirt has no call for a part.

Another client may change it at the same time (``virsh edit``), and libvirt has no call that replaces a definition only
if it is still the one that was read. So it is read once more right before it is replaced, and afterwards it is verified
that the change is in it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from .connection import Connection
from .daemon import DomainError
from .domain import Domain

#: Somebody who edits by hand is not in between twice.
_ATTEMPTS = 5


async def redefine(connection: Connection, domain: Domain, change: Callable[[str], Awaitable[str]]) -> None:
    """
    Change the persistent definition of a domain, which has one. The running domain stays as it is.

    :param change: returns a definition, with its secrets, as it should be; one that is so already is returned as it
        is. It may be called again for one that another client has defined meanwhile.
    :raises DomainError: libvirt refuses, or other clients change it all the time.
    """
    for _ in range(_ATTEMPTS):
        xml = await domain.inactive_xml()
        new = await change(xml)
        if new == xml:
            return
        if await domain.inactive_xml() == xml:
            await connection.define(new)
            now = await domain.inactive_xml()
            if await change(now) == now:
                return
    raise DomainError(
        f"other clients change the definition of domain {domain.name} all the time", hint="stop them, and try again"
    )
