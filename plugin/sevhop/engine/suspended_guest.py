"""
A guest that is suspended in the keeper, and may or may not be restored from there.

Its disks are nobody's meanwhile, and the world goes on without it. So it is not restored after somebody has changed an
image, nor after a long time without anybody asking for it: it would write what it remembers over what is new, or take
back what others have taken over since.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from ..disks import unchanged_images
from ..errors import GuestState, RecoveryRequired
from ..options import RecoverOptions
from ..records.hop_record import HopRecord, uptime

_HOUR = 3600.0


def verify_age(record: HopRecord, options: RecoverOptions) -> None:
    """:raises RecoveryRequired: the guest has been suspended for longer than a recovery may restore it."""
    age = uptime() - (record.stopped_at or record.began)
    if options.max_age is not None and age > options.max_age:
        raise RecoveryRequired(
            f"the guest has been suspended for {readable(age)}, and is not restored unasked after "
            f"{readable(options.max_age)}",
            "to resume it: sevhop recover {0}; to give it up: sevhop recover {0} --discard".format(
                shlex.quote(record.guest)
            ),
            GuestState.SUSPENDED,
        )


def verify_images(record: HopRecord, keeper: Mapping[str, Any]) -> None:
    """
    :param keeper: its status.
    :raises RecoveryRequired: somebody has changed an image since the guest was suspended.
    """
    if found := unchanged_images.changed(record.images, opened=keeper["restore_began"] > record.images_at):
        raise RecoveryRequired(
            f"an image was changed while the guest was suspended: {found}",
            f"if the guest can have it nevertheless: virsh restore {keeper['image']}; to give it up: sevhop recover "
            f"{shlex.quote(record.guest)} --discard",
            GuestState.SUSPENDED,
        )


def readable(seconds: float) -> str:
    """A time span, in the largest unit of which it has at least two."""
    for unit, length in (("h", _HOUR), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
