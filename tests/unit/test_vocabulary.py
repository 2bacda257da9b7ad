"""
One vocabulary: words that this project once had for what QEMU, libvirt and Linux have words for do not come back.

Only those are listed that mean nothing else here.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: Word, and the one to use.
WORDS = {
    r"black.?out": "downtime",
    r"broken.?off|breaks? off": "interrupted",
    r"under.?way": "in progress",
    r"behind the commit": "after the commit",
    r"stands? still": "is stopped; the downtime",
    r"afresh|\banew\b": "from a cold start, again",
    r"had twice": "can be shared",
    r"needs.?help": "manual action required",
    r"needs.?recover": "recovery required",
    r"remed(y|ies)": "hint",
    r"hurry|hurries": "realtime, boost",
    r"real-time(?! clock)": "realtime",
    r"\b(tells|told)\b": "says, names, shows, reports",
    r"urgenc?": "realtime, boost",
    r"name.?plates?": "guest paths",
    r"custody": "keeper server",
    r"guardian": "supervisor",
    r"mischief|meddler?": "fault",
    r"says nonsense": "invalid reply",
    r"\bKept(State|Block)\b|\bHeld\b\(": "SavedDeviceState, RamBlockCopy, SourceHandles",
    r"SEVHOP_DOMAIN\b": "SEVHOP_GUEST",
    r"outdated_guests": "outdated_domains",
    r"going on in another": "retrying in another",
}
#: Not ours to name: a field of Debian's changelog.
EXCEPT = {"debian/changelog": "urgency=medium"}


def lines() -> Iterator[tuple[str, int, str]]:
    """Path, number and text of every line of text that is kept in version control."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a clone: there is no list of files")
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if not name or path == Path(__file__) or path.suffix in (".svg", ".txt") or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if not (name in EXCEPT and EXCEPT[name] in line):
                yield name, number, line


def test_words_outside_the_vocabulary_are_not_used() -> None:
    forbidden = re.compile("|".join(f"(?:{word})" for word in WORDS), re.IGNORECASE)
    found = [f"{name}:{number}: {line.strip()}" for name, number, line in lines() if forbidden.search(line)]
    assert found == []
