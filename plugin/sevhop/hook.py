"""
libvirt's hook for QEMU domains (https://libvirt.org/hooks.html).

libvirt calls it at every step of every domain; the script in ``plugin/host`` comes here only for a domain that is in a
hop. All knowledge is in the keeper of that hop. What the hook asks is::

    hook OPERATION SUB-OPERATION UUID       ok [EMULATOR]  |  foreign  |  no REASON

===================  ================================================================================================
``restore begin``    the domain gets the emulator that the keeper names: the new one, or after a failure the old one
``prepare begin``    refused unless a restore has begun: nobody may start the domain afresh while its guest is held
``started begin``    the state is loaded, nothing runs: the keeper commits, and only then the guest may run
everything else      0. libvirt would kill a running guest if ``reconnect`` failed
===================  ================================================================================================

A domain of another daemon that happens to have the same name is ``foreign``, and is left alone. libvirt is never called
from here, it waits for us. This runs inside the blackout, so next to nothing is imported: of the standard library's
socket only the part in C, which takes a tenth of the time.
"""

from __future__ import annotations

import _socket
import os
import sys
from typing import TextIO

#: One entry for each hop under way: the domain's name, a link to the directory of its keeper.
DOMAINS = "/run/sevhop/domains"
#: Where there is something to ask; the script in ``host`` knows them, too.
_MATTERS = (("restore", "begin"), ("prepare", "begin"), ("migrate", "begin"), ("started", "begin"))
#: Seconds until the keeper must have answered. A commit may retry for seconds.
PATIENCE = 30.0
_MESSAGE = 4096


def main(arguments: list[str], stdin: TextIO, stdout: TextIO, stderr: TextIO, *, domains: str = DOMAINS) -> int:
    """
    Answer libvirt.

    :param arguments: domain, operation, sub-operation, extra.
    :param stdin: the domain's XML.
    :param stdout: for changed XML; otherwise nothing may be written to it.
    :param stderr: for the reason of a refusal, which libvirt quotes.
    :return: 0 if libvirt may go on.
    """
    name, operation, sub = (*arguments, "", "", "")[:3]
    if (operation, sub) not in _MATTERS or name in ("", ".", "..") or "/" in name:
        return 0
    try:
        directory = os.readlink(os.path.join(domains, name))
    except OSError:
        return 0
    xml = stdin.read()
    try:
        answer = ask(os.path.join(domains, directory, "control"), f"hook {operation} {sub} {_uuid(xml)}")
    except OSError as err:
        # A dead keeper's guest is gone, and what it has left behind must stop nobody but a destination of its own,
        # which has its directory in the XML.
        if os.path.basename(directory) not in xml:
            return 0
        stderr.write(f"sevhop: the keeper of domain {name} does not answer: {err.strerror or err}\n")
        return 1
    verdict, _, rest = answer.partition(" ")
    if verdict == "foreign":
        return 0
    if verdict != "ok":
        stderr.write(f"sevhop: {rest or answer}\n")
        return 1
    if rest and (operation, sub) == ("restore", "begin") and f"<emulator>{rest}</emulator>" not in xml:
        stdout.write(_with_emulator(xml, rest))
    return 0


def ask(path: str, request: str) -> str:
    """
    Ask a keeper one question.

    :raises OSError: nobody answers there.
    """
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    sock.settimeout(PATIENCE)
    try:
        sock.connect(path)
        sock.sendall(request.encode())
        answer = sock.recv(_MESSAGE).decode()
    finally:
        sock.close()
    if not answer:
        raise ConnectionResetError(0, "it hung up")
    return answer


def _uuid(xml: str) -> str:
    """The domain's UUID. libvirt writes it as the first element of that name."""
    uuid = xml.partition("<uuid>")[2].partition("</uuid>")[0].strip()
    return uuid if uuid and not set(uuid) - set("0123456789abcdefABCDEF-") else "-"


def _with_emulator(xml: str, emulator: str) -> str:
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from sevhop import domain_xml

    return domain_xml.with_emulator(xml, emulator)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], sys.stdin, sys.stdout, sys.stderr))
