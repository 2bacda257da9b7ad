"""
CPU features of a guest, compared between two QEMUs.

With ``-cpu max``, ``host`` or libvirt's ``host-passthrough`` they depend on the QEMU as well as on the host: a newer
one has more, and now and then one drops a feature that an older one had. A guest that has found a feature at its start
uses it for as long as it runs, so a lost feature causes an illegal instruction, or worse. A gained one is noticed only
by software that reads CPUID again.
"""

from __future__ import annotations

import asyncio
from typing import Any

from sevhop_qmp.errors import CommandError
from sevhop_qmp.invalid_data import protocol_errors
from sevhop_qmp.monitor import Commands

#: The registers that CPUID returns: "leaf[.subleaf] REGISTER" -> bits.
FeatureWords = dict[str, int]

#: Bits that QEMU derives from the number of cores and threads. Older versions do that only when the guest executes
#: CPUID: they are missing in the property, but not for the guest.
_FROM_TOPOLOGY = {"1 EDX": 1 << 28, "80000001 ECX": 1 << 1}

#: Properties of a CPU that are bits of MSRs, by the bit of CPUID without which the guest has no such MSR.
_MSR_FEATURES = {
    ("1 ECX", 5): ("vmx-",),
    ("7.0 EDX", 29): (
        *("rdctl-no", "ibrs-all", "rsba", "skip-l1dfl-vmentry", "ssb-no", "mds-no", "pschange-mc-no", "tsx-ctrl"),
        *("taa-no", "sbdr-ssdp-no", "fbsdp-no", "psdp-no", "fb-clear", "pbrsb-no", "gds-no", "rfds-no", "its-no"),
    ),
    ("7.0 EDX", 30): ("split-lock-detect",),
}


async def feature_words(monitor: Commands) -> FeatureWords:
    """
    The CPUID features of the guest, read from one of its processors: all have the same (property ``feature-words``).

    :raises SevhopError: QEMU does not answer, or its answers make no sense.
    """
    with protocol_errors(monitor.name):
        rows = await monitor.execute("qom-get", {"path": await _processor(monitor), "property": "feature-words"})
        found = {_label(row): int(row["features"]) for row in rows}
    return {label: bits & ~_FROM_TOPOLOGY.get(label, 0) for label, bits in found.items()}


def _label(row: dict[str, Any]) -> str:
    leaf = f"{int(row['cpuid-input-eax']):X}"
    if "cpuid-input-ecx" in row:
        leaf += f".{int(row['cpuid-input-ecx']):X}"
    return f"{leaf} {row['cpuid-register']}"


async def _processor(monitor: Commands) -> str:
    return str((await monitor.execute("query-cpus-fast"))[0]["qom-path"])


def lost(source: FeatureWords, destination: FeatureWords) -> list[str]:
    """Features that the guest would lose, such as ``CPUID 7.0 EBX bit 16``."""
    return [
        f"CPUID {label} bit {bit}"
        for label, bits in source.items()
        for bit in range(32)
        if bits & ~destination.get(label, 0) & (1 << bit)
    ]


def gained(source: FeatureWords, destination: FeatureWords) -> list[str]:
    """Features that the guest would gain."""
    return lost(destination, source)


async def lost_msr_features(source: Commands, destination: Commands, present: FeatureWords) -> list[str]:
    """
    The names of features in MSRs that the guest would lose. Most guests have no such MSR, and nothing is queried.

    :param present: the guest's CPUID features now.
    :raises SevhopError: QEMU does not answer, or its answers make no sense.
    """
    families = tuple(
        name for (label, bit), names in _MSR_FEATURES.items() if present.get(label, 0) & (1 << bit) for name in names
    )
    if not families:
        return []
    with protocol_errors(source.name):
        path, theirs = await _processor(source), await _processor(destination)
        rows = await source.execute("qom-list", {"path": path})
        names = [str(row["name"]) for row in rows if row["type"] == "bool" and str(row["name"]).startswith(families)]
    ours, others = await asyncio.gather(_values(source, path, names), _values(destination, theirs, names))
    return [name for name in names if ours.get(name) and not others.get(name)]


async def names_of_lost(source: Commands, destination: Commands) -> list[str]:
    """
    QEMU's names of lost features, as far as it has any. Takes seconds: there are hundreds.

    :raises SevhopError: QEMU does not answer, or its answers make no sense.
    """
    with protocol_errors(source.name):
        path, theirs = await _processor(source), await _processor(destination)
        rows = await source.execute("qom-list", {"path": path})
        names = [str(row["name"]) for row in rows if row["type"] == "bool"]
    ours, others = await asyncio.gather(_values(source, path, names), _values(destination, theirs, names))
    return [name for name in names if ours.get(name) and others.get(name) is False]


async def _values(monitor: Commands, path: str, names: list[str]) -> dict[str, bool]:
    async def one(name: str) -> bool:
        try:
            return bool(await monitor.execute("qom-get", {"path": path, "property": name}))
        except CommandError:
            return False

    return dict(zip(names, [await one(name) for name in names], strict=True))


async def compare(source: Commands, ours: FeatureWords, destination: Commands) -> tuple[str, str]:
    """
    Compare a destination with the source.

    :param ours: the guest's CPUID features now.
    :return: what the guest would lose, for a refusal, and what it would gain, for a note; empty if nothing.
    :raises SevhopError: one of them does not answer, or its answers make no sense.
    """
    theirs = await feature_words(destination)
    missing = lost(ours, theirs) + await lost_msr_features(source, destination, ours)
    if missing:
        names = ", ".join(await names_of_lost(source, destination)) or "QEMU has no name for it"
        return f"the guest's processors would lose {', '.join(missing)} ({names})", ""
    more = gained(ours, theirs)
    return "", f"the new QEMU gives the guest's processors more: {', '.join(more)}" if more else ""
