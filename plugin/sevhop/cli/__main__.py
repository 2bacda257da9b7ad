"""``python3 -m sevhop.cli``: the ``sevhop`` command."""

import sys

from .main import main

sys.exit(main())
