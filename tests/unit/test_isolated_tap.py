"""The tap of a rehearsal."""

from __future__ import annotations

import os

import pytest
from sevhop.engine.isolated_tap import open_tap
from sevhop_qmp.errors import SevhopError


@pytest.mark.parametrize("queues", [1, 2])
def test_tap_of_a_rehearsal_is_not_taken_for_the_sources(queues: int) -> None:
    """adopt.so recognizes those by O_NONBLOCK (qmp_ext/adopt/taps.c)."""
    try:
        descriptors = open_tap(queues)
    except SevhopError as err:
        pytest.skip(err.message)
    try:
        assert [os.get_blocking(descriptor) for descriptor in descriptors] == [True] * queues
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
