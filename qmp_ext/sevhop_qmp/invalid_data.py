"""What is wrong with data that cannot be used: in words for an administrator, not in Python's."""

from __future__ import annotations

import json


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
