"""Which domains a rule such as ``--all`` leaves out: those somebody has excluded, and those that have opted out."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from ..libvirt.domain import Domain


async def is_excluded(name: str, domain: Domain | None, patterns: Sequence[str], *, defined: bool = False) -> bool:
    """
    Whether a rule leaves out a domain.

    :param domain: None if libvirt does not know it, as in a hop of a transient one; then only its name counts.
    :param patterns: of names (:mod:`fnmatch`).
    :param defined: whether its persistent definition counts as well, which it has.
    :raises DomainError: libvirt does not answer, or does not know the domain any more.
    """
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
        return True
    if domain is None:
        return False
    return await domain.is_left_alone() or (defined and await domain.is_left_alone(defined=True))
