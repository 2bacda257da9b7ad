"""``python3 -m sevhop.cli``: the ``sevhop`` command."""

from .main import program

program()
