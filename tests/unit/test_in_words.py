"""No message has a value in Python's notation."""

from __future__ import annotations

import os

import pytest
from sevhop.process import confinement
from sevhop.process.confinement import Confinement
from sevhop.process.in_words import in_words
from sevhop.process.scheduling import Thread
from sevhop_qmp.process import QemuProcess


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        ("", "none"),
        ((), "none"),
        (True, "on"),
        ([0, 1], "0, 1"),
        ((("memory", "/x"), ("", "/y")), "memory:/x, :/y"),
        ([("RLIMIT_NOFILE", 1, 2)], "RLIMIT_NOFILE:1:2"),
        ("enforce", "enforce"),
    ],
)
def test_value_is_written_as_an_administrator_writes_it(value: object, text: str) -> None:
    assert in_words(value) == text


def test_affinity_of_another_thread_is_listed() -> None:
    mine = Thread.of(os.getpid())
    (found,) = mine._replace(affinity=frozenset({0, 2})).differences(mine._replace(affinity=frozenset({1})))
    assert found == "affinity is 1 in the new QEMU, 0, 2 in the old one"


def test_difference_of_users_is_listed() -> None:
    process = QemuProcess.open(os.getpid())
    try:
        own = Confinement.of(process)
    finally:
        process.close()
    (found,) = confinement.differences(own._replace(uids=(1, 2, 3)), own._replace(uids=(4, 5, 6)))
    assert found == "user is 4, 5, 6 in the new QEMU, 1, 2, 3 in the old one"
