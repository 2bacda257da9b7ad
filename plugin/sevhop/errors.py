"""
How a command of sevhop can end other than well. The class decides the exit status.

::

    SevhopError                 (sevhop_qmp.errors, the root of everything raised on purpose)
    ├── Refused                 1: nothing was touched
    ├── Undone                  3: failed, and the guest runs where it ran
    │   └── Interrupted         3: somebody has asked for it
    ├── NeedsRecover            4: the guest is paused and safe, ``sevhop recover`` is needed
    └── Lost                    5: the guest ended, though not by us: its QEMU died before its state was saved
"""

from __future__ import annotations

from sevhop_qmp.errors import SevhopError


class Refused(SevhopError):
    """The hop must not be tried. Nothing of the guest was touched."""


class Undone(SevhopError):
    """The hop failed before its commit and everything was put back."""


class Interrupted(Undone):
    """Somebody has asked for the hop to be undone while that was possible, and it was."""


class NeedsRecover(SevhopError):
    """The guest does not run, but nothing of it is lost."""


class Lost(SevhopError):
    """The guest ended together with its QEMU while a hop was prepared."""
