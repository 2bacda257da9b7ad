"""
SELinux: load sevhop's policy module, and remove it; and whether libvirt's daemon may run the hook with it. Where it may
not, every start of every domain would fail.

The module (``host/selinux/sevhop.cil``) has types for what sevhop shares with a QEMU and for the hook, and the few
permissions that a hop takes beyond those of libvirt and its domains. The tools of the policy (semodule(8)) rebuild and
load it as a whole, or not at all. Files that are there already get their labels here, others as restorecon(8) has them.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from sevhop_qmp import adopt_library, selinux
from sevhop_qmp.errors import SevhopError

from ..libvirt import hook_server
from ..records import run_directory

#: Name of the module, and its priority: that of local modules.
MODULE, PRIORITY = "sevhop", "400"
_RULES = Path(__file__).resolve().parent.parent / "host" / "selinux" / f"{MODULE}.cil"
_STORE = Path("/var/lib/selinux")
_CONFIGURATION = Path("/etc/selinux/config")
#: The type of the hook, and that of libraries.
HOOK, _LIBRARY = "sevhop_hook_exec_t", "lib_t"
#: A type that there is where the policy knows libvirt.
_OF_LIBVIRT = "svirt_image_t"
#: A daemon that does not run now, and what it starts, in the policies of Fedora and Debian.
_DAEMON, _QEMU = "system_u:system_r:virtd_t:s0", "system_u:system_r:svirt_t:s0"
#: What the daemon must have of a program; and QEMU of a library.
_TO_RUN, _TO_MAP = ("execute", "read", "open"), ("read", "open", "getattr", "map", "execute")
#: Characters of a path that must be escaped, since it is a regular expression there.
_SPECIAL = re.compile(r"[\\.*+?()\[\]{}^$|]")
#: Seconds for the tools of the policy.
_TIMEOUT = 1200.0


def active() -> bool:
    """Whether the kernel has a policy that knows libvirt."""
    return selinux.enabled() and selinux.knows(_label(_OF_LIBVIRT))


def install(script: Path, daemons: Iterable[int]) -> list[Path]:
    """
    Load the module, and label what is there. Where SELinux does not know libvirt this does nothing.

    :param script: libvirt's hook, which need not exist.
    :param daemons: pids of libvirt's daemons; none if no daemon runs.
    :return: where the tools of the policy keep the module.
    :raises SevhopError: the policy does not accept it, or does not let libvirt do with it what it must; then it is not
        loaded.
    """
    if not active():
        return []
    before = loaded()
    library = adopt_library.path()
    with tempfile.TemporaryDirectory(prefix="sevhop-") as directory:
        module = Path(directory, f"{MODULE}.cil")
        module.write_text(rules(script, hook_server.CLIENT, library))
        _semodule("-i", str(module))
    try:
        label_hook(hook_server.CLIENT)
        label(library, _LIBRARY)
        if run_directory.RUN.is_dir():
            selinux.share(run_directory.RUN)
        _verify(library, daemons)
    except BaseException:
        if not before:
            with contextlib.suppress(SevhopError):
                _semodule("-r", MODULE)
        raise
    return [_kept()]


def uninstall() -> bool:
    """
    Unload the module. Files that had a type of it get the label that the policy has for them.

    :return: whether it was there.
    :raises SevhopError: the tools of the policy fail.
    """
    if not loaded() and not _kept().exists():
        return False
    _semodule("-r", MODULE)
    restorecon = shutil.which("restorecon") or "/usr/sbin/restorecon"
    for path in (hook_server.CLIENT, run_directory.RUN):
        if path.exists():
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                subprocess.run([restorecon, "-RF", path], capture_output=True, timeout=_TIMEOUT, check=False)
    return True


def loaded() -> bool:
    """Whether the kernel has the module."""
    return selinux.shared_label() != ""


def rules(script: Path, client: Path, library: Path) -> str:
    """
    The module, for these files.

    :raises SevhopError: one of them has a name that cannot be written in it.
    """
    text = _RULES.read_text()
    for mark, path in (("@SCRIPT@", script), ("@CLIENT@", client), ("@LIBRARY@", library)):
        if re.search(r'["\s\x00-\x1f]', str(path)):
            raise SevhopError(f"SELinux cannot have rules for {str(path)!a}", "install sevhop elsewhere")
        text = text.replace(mark, _SPECIAL.sub(lambda found: f"\\{found[0]}", str(path)))
    return text


def label(path: Path, kind: str) -> None:
    """
    Give a file the type that the module has for it; nothing where SELinux does not know that type.

    :raises SevhopError: the kernel does not let us.
    """
    wanted = _label(kind) if selinux.enabled() else ""
    if not wanted or not selinux.knows(wanted):
        return
    try:
        selinux.set_label(path, wanted)
    except OSError as err:
        raise SevhopError(f"cannot label {path} as {kind}: {err.strerror}", "run sevhop as root") from err


def label_hook(path: Path) -> None:
    """:func:`label` a file as libvirt's hook."""
    label(path, HOOK)


def reason_against(source: str, daemons: Iterable[int]) -> str:
    """
    Why a QEMU that libvirt starts from now on could not take over the guest of a confined one; empty if it could.

    :param source: context of the confined one.
    :param daemons: pids of libvirt's daemons; none if no daemon runs.
    """
    if not selinux.enforcing():
        return ""
    if not loaded():
        return "SELinux would have the new QEMU drop adopt.so: the policy module sevhop is not loaded"
    for context in _contexts(daemons):
        if selinux.allows(context, source, "process", ["noatsecure"]) is False:
            return f"SELinux would have the new QEMU drop adopt.so: the module sevhop has no rule for {context}"
    return ""


def verify_hook(directory: Path, daemons: Iterable[int]) -> None:
    """
    Verify that libvirt's daemon may run a file that is created in a directory, or one that has the module's type for
    the hook. Without SELinux, or while that enforces nothing, this does nothing.

    :param directory: of the hooks; it need not exist.
    :param daemons: their pids; none if no daemon runs.
    :raises SevhopError: it may not.
    """
    if not selinux.enforcing():
        return
    if loaded():
        found: str | None = _label(HOOK)
    else:
        while not directory.exists():
            directory = directory.parent
        found = selinux.ask("create", selinux.context_of("self"), selinux.label_of(directory), "file")
    if found is None:
        raise SevhopError(f"SELinux does not know the label of files in {directory}", f"run: restorecon -R {directory}")
    for context in _contexts(daemons):
        if not _may_execute(context, found):
            kind = selinux.type_of(found)
            raise SevhopError(
                f"SELinux does not let libvirt ({context}) run hooks that are labelled {kind}, as those in {directory} "
                "are, so no domain could be started; nothing was installed",
                f"run: semanage fcontext -a -t bin_t '{directory}(/.*)?' && restorecon -R {directory}, then try again",
            )


def _contexts(daemons: Iterable[int]) -> list[str]:
    found = []
    for pid in daemons:
        with contextlib.suppress(OSError):
            found.append(selinux.context_of(pid))
    return found or [_DAEMON]


def _may_execute(context: str, found: str) -> bool:
    """Whether a process with this context may execute a file with this label, in its own domain or in another one."""
    wanted = [*_TO_RUN]
    if selinux.ask("create", context, found, "process") == context:
        wanted.append("execute_no_trans")
    return selinux.allows(context, found, "file", wanted) is not False  # None: no such domain in this policy


def _verify(library: Path, daemons: Iterable[int]) -> None:
    """:raises SevhopError: the module that was loaded does not suffice."""
    if not loaded():
        raise SevhopError("the policy module sevhop was installed, but is not loaded", "see semodule(8)")
    for context in _contexts(daemons):
        for target, kind, wanted in ((_QEMU, "process", ["noatsecure"]), (_label(HOOK), "file", [*_TO_RUN])):
            if selinux.allows(context, target, kind, wanted) is False:
                raise SevhopError(
                    f"the policy module sevhop has no rules for libvirt's daemon as it runs here ({context})",
                    "have the service of the distribution start it",
                )
    with contextlib.suppress(OSError):
        if selinux.allows(_QEMU, selinux.label_of(library), "file", _TO_MAP) is False:
            raise SevhopError(f"SELinux does not let a QEMU load {library} ({selinux.label_of(library)})")


def _label(kind: str) -> str:
    """Of a file of ours with this type."""
    try:
        return selinux.object_context(selinux.context_of("self"), kind)
    except (OSError, ValueError):
        return ""


def _kept() -> Path:
    """Where the tools of the policy keep the module."""
    name = "targeted"
    with contextlib.suppress(OSError):
        for line in _CONFIGURATION.read_text().splitlines():
            if line.startswith("SELINUXTYPE="):
                name = line.partition("=")[2].strip()
    return _STORE / name / "active" / "modules" / PRIORITY / MODULE


def _semodule(*arguments: str) -> None:
    """:raises SevhopError: it fails; then nothing has changed."""
    program = shutil.which("semodule") or "/usr/sbin/semodule"
    try:
        done = subprocess.run(
            [program, "-X", PRIORITY, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
            check=False,
        )
    except OSError as err:
        raise SevhopError(f"cannot run {program}: {err.strerror}", "install the package policycoreutils") from err
    except subprocess.TimeoutExpired as err:
        raise SevhopError(f"{program} was killed: it took longer than {_TIMEOUT:g} s") from err
    if done.returncode:
        reason = (done.stderr.strip() or "no reason was given").splitlines()[-1]
        raise SevhopError(f"SELinux does not accept the policy module sevhop: {reason}", "nothing was changed")
