"""
Hostile input: nothing that sevhop parses may make it do more than refuse.

With ``tools/test`` each property sees some dozens of inputs, always the same ones. ``tools/fuzz`` runs the long
campaign: ``SEVHOP_FUZZ_EXAMPLES`` inputs for each property, from a seed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from .inputs import COUNTS

_CAMPAIGN = os.environ.get("SEVHOP_FUZZ_EXAMPLES")
#: Where the campaign wants the number of inputs that each property has seen.
_REPORT = os.environ.get("SEVHOP_FUZZ_REPORT")

# The machine may be busy, and a deadline would only report that.
settings.register_profile(
    "sevhop",
    max_examples=int(_CAMPAIGN or 60),
    derandomize=_CAMPAIGN is None,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("sevhop")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Report to the campaign."""
    if _REPORT:
        Path(_REPORT).write_text(json.dumps(COUNTS))
