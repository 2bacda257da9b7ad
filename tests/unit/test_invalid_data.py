"""What is wrong with data is said in words for an administrator."""

from __future__ import annotations

import json

import pytest
from sevhop_qmp.errors import MonitorError
from sevhop_qmp.invalid_data import InvalidData, invalid, protocol_errors


def error(code: str) -> Exception:
    """What that code raises."""
    try:
        eval(code, {"json": json})
    except Exception as err:
        return err
    raise AssertionError(code)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("{}['uuid']", "the field uuid is missing"),
        ("[][0]", "a part is missing"),
        ("json.loads('{')", "a line is not JSON"),
        (r"b'\xff'.decode()", "a text is not valid UTF-8"),
        ("int('x')", "a value is of another kind than expected"),
        ("None + [1, 'x']", "a value is of another kind than expected"),
        ("1 // 0", "a number is out of range"),
    ],
)
def test_errors_of_python_are_put_into_words(code: str, text: str) -> None:
    assert invalid(error(code)) == text


def test_own_message_is_kept() -> None:
    assert invalid(InvalidData("there is no such process")) == "there is no such process"


def test_invalid_answer_of_qemu_is_reported_without_pythons_notation() -> None:
    answer: dict[str, str] = {}
    with pytest.raises(MonitorError) as caught, protocol_errors("query-block"):
        answer["device"]
    assert caught.value.message == "query-block: invalid answer from QEMU (the field device is missing)"
