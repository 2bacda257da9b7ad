"""What holds for every test in a lab that keeps the memory of guests encrypted."""

from __future__ import annotations

from ..contract.conftest import no_context_left

__all__ = ["no_context_left"]
