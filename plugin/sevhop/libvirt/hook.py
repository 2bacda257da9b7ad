"""
libvirt's hook for QEMU domains (https://libvirt.org/hooks.html).

libvirt calls it at every step of every domain; the script in ``host/qemu.d`` runs this only for a domain that is in a
hop. The keeper of that hop decides. The hook's request and the keeper's replies are::

    hook OPERATION SUB-OPERATION UUID       ok [EMULATOR]  |  again EMULATOR  |  foreign  |  error REASON

======================  =============================================================================================
``restore begin``       the domain gets the emulator that the keeper names: the new one, or after a failure the old
                        one; restored again, its displays may get other ports: those may be what failed
``restore another``     the same for an image that sevhop has not written, such as an older one of ``virsh save``:
                        refused as long as the guest is somewhere else than in there
``prepare begin``       refused unless a restore has begun
``prepare cold-start``  the same for a domain that is started, not restored: refused while its guest is suspended in
                        the keeper, or the guest of another domain of that name is
``started begin``       the state is loaded, nothing runs: the keeper commits, and only then the guest may run
``release end``         the domain is off: if its QEMU has shut down because of a reboot, and ``<on_reboot>`` is
                        ``restart``, it is started by a process of its own (:mod:`sevhop.records.reboot_mark`), after
                        the hop if one is in progress
everything else         0. libvirt would kill a running guest if ``reconnect`` failed
======================  =============================================================================================

A domain that is in no hop may have been in one: when it is saved and restored, or migrated here, what that hop has
added to its XML is removed. A save image of sevhop's has no RAM in it and is marked; without its keeper it is refused.

A keeper that dies before it replies is not asked again: the refusal makes libvirt terminate the destination, and the
next restore finds the restarted keeper.

A hop is identified by the UUID: a domain that was renamed while its guest is suspended in the keeper is found by it.
Until the guest runs again, another domain of that name is not started, restored or migrated here; at all other steps,
and afterwards, it is ``foreign``, and is left alone. The hook never calls libvirt, which waits for it. During the
downtime the keeper itself runs this (:mod:`sevhop.libvirt.hook_server`). Without a keeper it is a program that imports
next to nothing: of the standard library's socket only the part in C, which takes a tenth of the time.
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

#: For each hop in progress a link to the directory of its keeper, named like the domain. Beside it ``uuid-UUID``.
DOMAINS = "/run/sevhop/domains"
#: The steps at which the keeper is asked; the script in ``host`` has them, too.
_KEEPER_STEPS = (("restore", "begin"), ("prepare", "begin"), ("migrate", "begin"), ("started", "begin"))
#: An environment variable in the XML of a save image that sevhop has written, without the guest's RAM.
IMAGE_MARK = "SEVHOP_IMAGE"
#: In a keeper's directory: pid and start time of the QEMU beside libvirt that the guest runs in.
TRANSIT = "transit"
_RESTORED_MARK = "SEVHOP_RESTORED"
#: In the XML of every domain that has hopped, and is not parsed otherwise.
_MARK = "SEVHOP_"
#: Seconds until the keeper must have replied. A commit may retry for seconds.
PATIENCE = 30.0
_MESSAGE = 4096
#: Operations that begin a start of a domain.
_STARTS = ("prepare", "restore", "migrate")


def main(
    arguments: list[str],
    stdin: TextIO,
    stdout: TextIO,
    stderr: TextIO,
    *,
    domains: str = DOMAINS,
    keeper: Callable[[str], str] | None = None,
    start: Callable[[str, str], None] | None = None,
) -> int:
    """
    Run the hook.

    :param arguments: domain, operation, sub-operation, extra.
    :param stdin: the domain's XML.
    :param stdout: for the XML, if it is to be changed; otherwise nothing may be written to it.
    :param stderr: for the reason of a refusal, which libvirt quotes.
    :param keeper: sends a request to the domain's keeper; by default to the one whose directory is in ``domains``.
    :param start: starts a domain, given UUID and URI, without waiting for it; by default :func:`start_again`.
    :return: 0 if libvirt may continue.
    """
    name, operation, sub = (*arguments, "", "", "")[:3]
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        return 0
    if (operation, sub) == ("release", "end"):
        _released(os.path.join(os.path.dirname(domains), "reboot", name), stdin.read(), start)
    if (operation, sub) not in _KEEPER_STEPS:
        return 0

    def linked(request: str) -> str:
        try:
            directory = os.path.join(domains, os.readlink(os.path.join(domains, name)))
        except FileNotFoundError:  # it may have been renamed since it was suspended in the keeper
            directory = os.path.join(os.path.dirname(domains), f"uuid-{request.rpartition(' ')[2].lower()}")
        try:
            return ask(os.path.join(directory, "control"), request)
        except (FileNotFoundError, ConnectionRefusedError):
            # Nothing but a start is refused: libvirt ends a QEMU whose hook fails when the daemon connects to it again.
            if request.split(" ")[1] in _STARTS and (pid := transit_of(directory)):
                where = f"its guest runs in the transit (process {pid}), which has no keeper any more"
                return f"error cannot start domain {name}: {where}; run: sevhop recover"
            raise

    try:
        refused, changed = _answer(name, operation, sub, stdin.read(), keeper or linked)
    except ValueError as err:  # DomainXmlError among them
        refused, changed = f"cannot parse the domain's XML: {err}", ""
    if refused:
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in refused)
        stderr.write(f"sevhop: {line}\n")
        return 1
    stdout.write(changed)
    return 0


def transit_of(directory: str) -> str:
    """The pid of the QEMU beside libvirt that the guest runs in, by what is in a keeper's directory; or empty."""
    try:
        with open(os.path.join(directory, TRANSIT)) as file:
            pid, started = file.read(_MESSAGE).split()
        with open(f"/proc/{int(pid)}/stat") as file:
            fields = file.read(_MESSAGE).rpartition(")")[2].split()
        return pid if fields[19] == started and fields[0] != "Z" else ""
    except (OSError, ValueError, IndexError):
        return ""


def _answer(name: str, operation: str, sub: str, xml: str, keeper: Callable[[str], str]) -> tuple[str, str]:
    """Why libvirt may not continue, and the changed XML; empty if it may, or if nothing changes."""
    # Not parsed where that decides nothing: the guest waits.
    try:
        if operation == "prepare" and _RESTORED_MARK not in _marks(xml):
            sub = "cold-start"
        elif operation == "restore" and IMAGE_MARK not in xml:
            sub = "another"
        answer = keeper(f"hook {operation} {sub} {_uuid(xml)}")
    except (ConnectionResetError, BrokenPipeError, TimeoutError, BlockingIOError):
        # If the keeper has just died it is restarted. Whether it has committed is not known here.
        answer = f"error the keeper of domain {name} did not reply, and has its guest; try again"
    except (OSError, UnicodeEncodeError):
        answer = "foreign"
    verdict, _, rest = answer.partition(" ")
    if verdict == "foreign":
        # Not in a hop, or left behind by a dead keeper: that must stop nothing but a destination of that hop.
        marks = _marks(xml)
        if IMAGE_MARK in marks or (operation == "started" and _RESTORED_MARK in marks):
            return f"the keeper of domain {name} is gone, and the guest's memory with it: start the domain", ""
        if operation in ("restore", "migrate") and marks:
            return "", _domain_xml().without_additions(xml)
        return "", ""
    if verdict not in ("ok", "again"):
        return rest or answer, ""
    if operation != "restore":
        return "", ""
    if _MARK in xml:
        xml = _domain_xml().with_mark_renamed(xml, IMAGE_MARK, _RESTORED_MARK)
    if rest and f"<emulator>{rest}</emulator>" not in xml:
        xml = _domain_xml().with_emulator(xml, rest)
    if verdict == "again" and _MARK in xml:
        xml = _domain_xml().with_chosen_ports(xml)
    return "", xml


def _released(directory: str, xml: str, start: Callable[[str, str], None] | None) -> None:
    """The domain is off. Its reboot mark is removed; if that is set, the domain is started as its XML has it."""
    found = {}
    for name in ("mark", "domain"):
        path = os.path.join(directory, name)
        try:
            with open(path, "rb") as file:
                found[name] = file.read(_MESSAGE)
            os.unlink(path)
        except OSError:
            continue
    try:
        os.rmdir(directory)
    except OSError:
        return
    uuid, _, uri = found.get("domain", b"").decode(errors="replace").partition(" ")
    try:
        if found.get("mark") == b"\1" and uuid == _uuid(xml) and _domain_xml().describe(xml).on_reboot == "restart":
            (start or start_again)(uuid, uri)
    except ValueError:  # the XML cannot be parsed
        return


def start_again(uuid: str, uri: str) -> None:
    """
    Have a domain started by a process of its own, as soon as libvirt has finished with it. That waits for this hook, so
    nothing of libvirt's is called here, and none of libvirt's streams is kept open.
    """
    null = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1, 2)]
    words = [sys.executable, "-s", "-P", "-m", "sevhop.cli.cold_start", uuid, uri]
    environment = {**os.environ, "PYTHONPATH": _packages()}
    os.posix_spawn(sys.executable, words, environment, file_actions=null, setsid=True)


def ask(path: str, request: str) -> str:
    """
    Send a keeper one request.

    :raises OSError: no keeper replies.
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
        raise ConnectionResetError(0, "the keeper closed the connection")
    return answer


def _marks(xml: str) -> dict[str, str]:
    """What a hop has left in a domain."""
    return _domain_xml().marks(xml) if _MARK in xml else {}


def _uuid(xml: str) -> str:
    """The domain's UUID. libvirt writes it as the first element of that name."""
    uuid = xml.partition("<uuid>")[2].partition("</uuid>")[0].strip()
    return uuid if uuid and not set(uuid) - set("0123456789abcdefABCDEF-") else "-"


def _domain_xml() -> ModuleType:
    """The module; rarely needed. It is not on the path: the hook runs without the environment's packages."""
    if (packages := _packages()) not in sys.path:
        sys.path.insert(0, packages)
    from sevhop.libvirt import domain_xml

    return domain_xml


def _packages() -> str:
    """The directory that has the package of this module."""
    return os.path.abspath(__file__).rsplit("/", 3)[0]


def stream(descriptor: int, mode: str) -> TextIO:
    """One of libvirt's streams. It is UTF-8 in every locale; what is not is passed on unchanged."""
    return open(descriptor, mode, encoding="utf-8", errors="surrogateescape", closefd=False)  # type: ignore[return-value]


if __name__ == "__main__":
    with stream(0, "r") as xml, stream(1, "w") as out:
        status = main(sys.argv[1:], xml, out, sys.stderr)
    sys.exit(status)
