"""
sevhop replaces the QEMU process under a running guest.

==========================  =============================================================
:mod:`sevhop.cli`           the command line: arguments, output, exit codes
:mod:`sevhop.hop`           the engine: the phases of a hop in order, each with its undo
:mod:`sevhop.check`         can this guest hop? a tree of named tests
:mod:`sevhop.guest`         what a running QEMU tells of its guest
:mod:`sevhop.command_line`  the destination's command line, derived from the source's
:mod:`sevhop.destination`   the new QEMU process: started like the old one, and ended again
:mod:`sevhop.keeper`        what holds the guest's memory, VM and sockets between two QEMUs
:mod:`sevhop.errors`        how a hop can end other than well
==========================  =============================================================
"""
