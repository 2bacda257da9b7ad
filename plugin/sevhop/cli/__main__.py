"""``python3 -m sevhop.cli``: the ``sevhop`` command."""

import sys

from .commands import main

sys.exit(main())
