"""
Faults, and what becomes of the guests.

==================  =================================================================================
module              what
==================  =================================================================================
``fault``           at which point of a hop, and what happens there
``broken_hop``      a hop outside libvirt in which something is killed, refused or silent at one point
``broken_upgrade``  the same of a domain
``operator``        somebody who does something to the guest meanwhile
``table``           step by fault: what became of the guest; filled in by the tests
``soaked_guests``   the guests that are soaked
``soaking``         what ``tools/soak`` runs: many hops, with faults chosen at random
==================  =================================================================================
"""
