"""
Guest downtime when its QEMU is replaced, measured side by side: by sevhop, and by the methods of QEMU and libvirt.

``domains`` measures libvirt's methods, ``standalone`` those between QEMU processes; ``downtime`` samples the guest;
``report`` has the arithmetic and the tables, ``picture`` the diagram.
"""
