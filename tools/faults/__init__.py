"""
Faults, and what becomes of the guests.

===============  =================================================================================
module           what
===============  =================================================================================
``broken_hop``   a hop outside libvirt in which something is killed, refused or silent at one point
``table``        step by fault: what became of the guest; filled in by the tests
``soaking``      what ``tools/soak`` runs: many hops, with faults chosen at random
===============  =================================================================================
"""
