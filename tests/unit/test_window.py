"""The maintenance window of a fleet."""

from __future__ import annotations

from datetime import time

import pytest
from sevhop.options import Window


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("01:00-05:00", ["01:00", "04:59"], ["00:59", "05:00", "13:00"]),
        ("22:30-4:00", ["22:30", "23:59", "00:00", "03:59"], ["04:00", "22:29"]),
    ],
)
def test_window_is_a_part_of_the_day(text: str, inside: list[str], outside: list[str]) -> None:
    window = Window.parse(text)
    for moment in inside + outside:
        assert window.includes(time.fromisoformat(moment)) == (moment in inside), moment


def test_window_is_written_as_it_is_read() -> None:
    assert str(Window.parse("1:00-05:00")) == "01:00-05:00"


@pytest.mark.parametrize("text", ["", "01:00", "1-5", "01:00-25:00", "01:00-01:00", "01:60-02:00", "01:00-05:00 UTC"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not of the form|has no length|unconverted|does not match"):
        Window.parse(text)
