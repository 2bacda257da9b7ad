"""
QMP as the hop of a running guest needs it.

This package controls QEMU processes and inspects them from outside. It knows nothing of libvirt, of the order
of a hop, or of what is allowed: that is :mod:`sevhop`, which imports this package and never the other way
round.

============================  ==================================================================
:mod:`.monitor`               a QMP connection: commands, descriptors, events, deadlines
:mod:`.adopt_library`         adopt.so, and how a QEMU gets it
:mod:`.adopt`                 the commands that it adds to a destination
:mod:`.move`                  the call that moves the SEV context, its errnos and when to retry
:mod:`.misc_cgroup`           whether EBUSY means that no SEV ASID is left
:mod:`.run_mark`              whether the guest has run in the destination
:mod:`.device_state`          saving the device state, completing the stream, loading it
:mod:`.saved_device_state`    the device state in memory, when the source exits first
:mod:`.ram_blocks`            the RAM blocks of a QEMU: which are shared, which private
:mod:`.ram_block_table`       the output of ``info ramblock``
:mod:`.ram_block_structures`  where RAM blocks are in a QEMU before version 8
:mod:`.ram_block_sync`        private RAM blocks, copied from one process to the other
:mod:`.saved_ram_blocks`      copies of private RAM blocks, when the source exits first
:mod:`.process`               a QEMU process, read from /proc: descriptors, mappings, identity
:mod:`.pidfd_process`         a process by its pidfd; :mod:`.proc_directory`, its /proc
:mod:`.credentials`           the user that a process runs as
:mod:`.thread_states`         whether its threads execute anything
:mod:`.address_space`         its mappings, kept after its exit
:mod:`.open_images`           the files that it has open; :mod:`.image_locks`, its locks on them
:mod:`.stream_sockets`        its stream sockets and their addresses
:mod:`.peer`                  the process at the other end of a socket
:mod:`.invalid_data`          what is wrong with data that cannot be used
:mod:`.time_limits`           how long a command may take
:mod:`.exported`              variables that a QEMU exports
:mod:`.errors`                what can go wrong, under one root
============================  ==================================================================
"""
