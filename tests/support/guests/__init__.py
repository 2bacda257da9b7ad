"""
Guests that notice when they are harmed, and the QEMUs to run them in.

Tests, ``tools/demo`` and the measurements run these guests while they are hopping, and have them judged afterwards:

===============  ========================================================================================
module           what
===============  ========================================================================================
``emulators``    the QEMU versions: the machine's own, and others fetched by ``tools/fetch-qemu``
``machine``      a guest's command line, from a short description
``counter``      a bare-metal guest that counts and checks its memory; boots in no time, runs under KVM and TCG
``linux``        a small Linux that writes to its disk, pings, checks its memory; under TCG, or as SEV guest
``lines``        serial lines and virtio ports, on which somebody talks to that Linux
``running``      a guest that runs: start, control, wait, stop
``daemon``       a libvirt daemon of one's own, and domains in it
``enclosure``    the file systems and the process in which that daemon lives
``isolation``    a mount namespace in which nothing is seen of the host's sevhop, nor of another run
``host_memory``  huge pages, which the host must be asked for
``ending``       whoever ends a program that has guests leaves none behind
``life``         what is done to a guest while it runs: snapshots, media, disks, cards, settings, pauses
``domain_life``  the same for a domain
``judge``        what happened to a guest: ticks lost or repeated, restarts, damage to disk and memory
===============  ========================================================================================

No part of the product; programs in ``tools/`` import it with the root of the tree in their Python path.
"""
