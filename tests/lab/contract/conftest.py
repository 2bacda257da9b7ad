"""What holds for every test of the kernel's contract."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .sev import contexts


@pytest.fixture(autouse=True)
def no_context_left() -> Iterator[None]:
    """Every context ends with the VM that has it; neither the kernel nor a test may leak one."""
    assert contexts() == []
    yield
    assert contexts() == []
