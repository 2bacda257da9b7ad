"""AppArmor as the kernel has it: what confines a process, and which copies of a domain's profile are loaded."""

from __future__ import annotations

from pathlib import Path

from .daemon import DomainGuest, process_file

#: The kernel's interface; without AppArmor there is none.
SECURITY = Path("/sys/kernel/security/apparmor")
LOADED = SECURITY / "profiles"


def confinement(pid: int, root: Path = Path("/")) -> str:
    """The label of a process. :param root: of the file system in whose /proc it has this number."""
    return (root / f"proc/{pid}/attr/current").read_text().strip("\n\0")


def profile_of(guest: DomainGuest) -> str:
    """The profile that libvirt makes for a domain; it must not be busy with that."""
    return f"libvirt-{guest.daemon.virsh('domuuid', guest.name)}"


def label(profile: str) -> str:
    """That of a domain's QEMU, by the domain's profile."""
    return f"{profile} (enforce)"


def copies(profile: str) -> list[str]:
    """Label of each copy of a domain's profile that the kernel has, and of what is in it."""
    return [line for line in LOADED.read_text().splitlines() if line.startswith(f"{profile}-")]


def copy(profile: str) -> str:
    """
    Label of the only copy of a domain's profile.

    :raises ValueError: there is none, or another one.
    """
    # Since libvirt 11 a domain's profile has one of its own in it, for passt.
    (label,) = (line for line in copies(profile) if "//" not in line)
    return label


def confined_by(label: str) -> list[int]:
    """The processes that have a label."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if process_file(pid, "attr/current").decode().strip("\n\0") == label]
