"""Numbers and tables for people, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def number(value: float) -> str:
    """With one decimal below 100."""
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def ratio(value: float | None) -> str:
    """With two digits at least; empty if there is none."""
    return "" if value is None else f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def memory(mib: int) -> str:
    """A size of memory."""
    return f"{mib // 1024} GB" if mib >= 1024 and mib % 1024 == 0 else f"{mib} MB"


def version(text: str) -> str:
    """Major and minor version of QEMU."""
    return ".".join(text.split(".")[:2])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Its lines."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
