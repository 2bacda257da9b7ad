"""What is wrong with data that cannot be used: in words for an administrator, not in Python's."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

from .errors import MonitorError


class InvalidData(ValueError):
    """Damaged or hostile data, with a message for an administrator."""


def invalid(error: Exception) -> str:
    """
    Describe an error that arose when data was read.

    :return: a clause, such as "the field uuid is missing".
    """
    if isinstance(error, InvalidData):
        return str(error)
    if isinstance(error, KeyError) and error.args:
        return f"the field {error.args[0]} is missing"
    for kind, text in _TEXTS.items():
        if isinstance(error, kind):
            return text
    return "a value is of another kind than expected"


_TEXTS: dict[type[Exception], str] = {
    LookupError: "a part is missing",
    RecursionError: "it is nested too deeply",
    json.JSONDecodeError: "a line is not JSON",
    UnicodeError: "a text is not valid UTF-8",
    ArithmeticError: "a number is out of range",
}


@contextlib.contextmanager
def protocol_errors(name: str) -> Iterator[None]:
    """
    Around code that parses an answer: a compromised QEMU may answer anything.

    :raises MonitorError: the answer is invalid.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as err:
        hint = "report this, with the version of QEMU"
        raise MonitorError(f"{name}: invalid answer from QEMU ({invalid(err)})", hint) from err
