"""
libvirt's hook for QEMU domains (https://libvirt.org/hooks.html).

libvirt calls it at every step of every domain; the script in ``plugin/host`` comes here only for a domain that is in a
hop. All knowledge is in the keeper of that hop. What the hook asks is::

    hook OPERATION SUB-OPERATION UUID       ok [EMULATOR]  |  again EMULATOR  |  foreign  |  no REASON

===================  ================================================================================================
``restore begin``    the domain gets the emulator that the keeper names: the new one, or after a failure the old one;
                     restored again, it may get other ports for its displays: those may be what failed
``prepare begin``    refused unless a restore has begun
``prepare afresh``   the same of a domain that is started, not restored: refused for as long as its guest is held, and
                     for as long as another domain's guest of that name is
``started begin``    the state is loaded, nothing runs: the keeper commits, and only then the guest may run
everything else      0. libvirt would kill a running guest if ``reconnect`` failed
===================  ================================================================================================

A domain that is in no hop may have been in one: when it is saved and restored, or migrated here, what that hop has
added to its XML is taken out again. A save image of sevhop's has no RAM in it and is marked; without its keeper it is
refused.

A keeper that dies while it is asked is not asked again: the refusal makes libvirt end the destination, and whoever
restores next finds the keeper's successor.

Whose hop it is is told by the UUID: a domain that was renamed while its guest is held is found by it. Another domain of
that name is not started, restored or migrated here while the name is held; at all other steps, and when the guest runs
again, it is ``foreign``, and is left alone. libvirt is never called from here, it waits for us. Inside the blackout the
keeper itself runs this (:mod:`sevhop.libvirt.hook_server`). Without one it is a program, which imports next to nothing:
of the standard library's socket only the part in C, which takes a tenth of the time.
"""

from __future__ import annotations

import _socket
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import TextIO

#: One entry for each hop under way: the domain's name, a link to the directory of its keeper. Beside it ``uuid-UUID``.
DOMAINS = "/run/sevhop/domains"
#: Where there is something to ask; the script in ``host`` knows them, too.
_MATTERS = (("restore", "begin"), ("prepare", "begin"), ("migrate", "begin"), ("started", "begin"))
#: An environment variable in the XML of a save image that sevhop has written: the guest's RAM is not in it.
IMAGE_MARK = "SEVHOP_IMAGE"
_RESTORED_MARK = "SEVHOP_RESTORED"
#: Seconds until the keeper must have answered. A commit may retry for seconds.
PATIENCE = 30.0
_MESSAGE = 4096


def main(
    arguments: list[str],
    stdin: TextIO,
    stdout: TextIO,
    stderr: TextIO,
    *,
    domains: str = DOMAINS,
    keeper: Callable[[str], str] | None = None,
) -> int:
    """
    Answer libvirt.

    :param arguments: domain, operation, sub-operation, extra.
    :param stdin: the domain's XML.
    :param stdout: for the XML, if it is to be changed; otherwise nothing may be written to it.
    :param stderr: for the reason of a refusal, which libvirt quotes.
    :param keeper: asks the domain's keeper; by default the one whose directory ``domains`` names.
    :return: 0 if libvirt may go on.
    """
    name, operation, sub = (*arguments, "", "", "")[:3]
    if (operation, sub) not in _MATTERS or name in ("", ".", "..") or "/" in name or "\0" in name:
        return 0

    def linked(request: str) -> str:
        try:
            directory = os.path.join(domains, os.readlink(os.path.join(domains, name)))
        except FileNotFoundError:  # it may have been renamed while it is held
            directory = os.path.join(os.path.dirname(domains), f"uuid-{request.rpartition(' ')[2].lower()}")
        return ask(os.path.join(directory, "control"), request)

    try:
        refused, changed = _answer(name, operation, sub, stdin.read(), keeper or linked)
    except ValueError as err:  # DomainXmlError among them
        refused, changed = f"the domain's XML is not understood: {err}", ""
    if refused:
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in refused)
        stderr.write(f"sevhop: {line}\n")
        return 1
    stdout.write(changed)
    return 0


def _answer(name: str, operation: str, sub: str, xml: str, keeper: Callable[[str], str]) -> tuple[str, str]:
    """Why libvirt may not go on, and the changed XML; empty if it may, or if nothing changes."""
    try:
        if operation == "prepare" and f"'{_RESTORED_MARK}'" not in xml:
            sub = "afresh"
        answer = keeper(f"hook {operation} {sub} {_uuid(xml)}")
    except (ConnectionResetError, BrokenPipeError, TimeoutError, BlockingIOError):
        # There is a keeper, and if it has just died there is another. What it has done is not known here.
        answer = f"no the keeper of domain {name} broke off; the guest is held, try again"
    except (OSError, UnicodeEncodeError):
        answer = "foreign"
    verdict, _, rest = answer.partition(" ")
    if verdict == "foreign":
        # Not in a hop, or what a dead keeper has left behind. That must stop nothing but a destination of its own.
        if f"'{IMAGE_MARK}'" in xml or (operation == "started" and f"'{_RESTORED_MARK}'" in xml):
            return f"the keeper of domain {name} is gone, and the guest's memory with it", ""
        if operation in ("restore", "migrate") and "'SEVHOP_" in xml:
            return "", _domain_xml().without_additions(xml)
        return "", ""
    if verdict not in ("ok", "again"):
        return rest or answer, ""
    if operation != "restore":
        return "", ""
    xml = xml.replace(f"'{IMAGE_MARK}'", f"'{_RESTORED_MARK}'")
    if rest and f"<emulator>{rest}</emulator>" not in xml:
        xml = _domain_xml().with_emulator(xml, rest)
    if verdict == "again" and "'SEVHOP_AUTOPORT'" in xml:
        xml = _domain_xml().with_chosen_ports(xml)
    return "", xml


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
        answer = sock.recv(_MESSAGE).decode(errors="replace")
    finally:
        sock.close()
    if not answer:
        raise ConnectionResetError(0, "it hung up")
    return answer


def _uuid(xml: str) -> str:
    """The domain's UUID. libvirt writes it as the first element of that name."""
    uuid = xml.partition("<uuid>")[2].partition("</uuid>")[0].strip()
    return uuid if uuid and not set(uuid) - set("0123456789abcdefABCDEF-") else "-"


def _domain_xml() -> ModuleType:
    """The module, which is rarely needed, and must be looked for: the hook runs without the environment's packages."""
    sys.path.insert(0, os.path.abspath(__file__).rsplit("/", 3)[0])
    from sevhop.libvirt import domain_xml

    return domain_xml


def stream(descriptor: int, mode: str) -> TextIO:
    """One of libvirt's. It speaks UTF-8, whatever its locale is; what is not is passed on as it came."""
    return open(descriptor, mode, encoding="utf-8", errors="surrogateescape", closefd=False)  # type: ignore[return-value]


if __name__ == "__main__":
    with stream(0, "r") as xml, stream(1, "w") as out:
        status = main(sys.argv[1:], xml, out, sys.stderr)
    sys.exit(status)
