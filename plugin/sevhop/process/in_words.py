"""Values that the kernel reports of a process, for a message: as an administrator writes them, not as Python does."""

from __future__ import annotations

from collections.abc import Iterable


def in_words(value: object) -> str:
    """
    Describe a value.

    :return: the members of a collection, separated by commas, those of a member by colons; "none" for what is empty.
    """
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Iterable) and not isinstance(value, str):
        value = ", ".join(":".join(map(str, one)) if isinstance(one, tuple | list) else str(one) for one in value)
    return str(value) if value != "" else "none"
