"""
QMP as the hop of a running guest needs it.

This package talks to QEMU processes and inspects them from outside. It knows nothing of libvirt, of the order
of a hop, or of what is allowed: that is :mod:`sevhop`, which imports this package and never the other way
round.

=======================  ==================================================================
:mod:`.monitor`          a QMP connection: commands, descriptors, events, deadlines
:mod:`.adopt`            the commands that adopt.so adds to a destination
:mod:`.move`             the call that moves the SEV context, its errnos and when to retry
:mod:`.misc_cgroup`      whether EBUSY means that no SEV ASID is left
:mod:`.process`          a QEMU process, read from /proc: descriptors, mappings, identity
:mod:`.ram_blocks`       its RAM blocks: which are shared, which private
:mod:`.ram_block_sync`   private RAM blocks, copied from one process to the other
:mod:`.device_state`     saving the device state, completing the stream, loading it
:mod:`.errors`           what can go wrong, under one root
=======================  ==================================================================
"""
