"""
Measurements side by side: how long a guest stands still when it changes its QEMU, by sevhop and by what else there is.

``domains`` measures libvirt's ways, ``bare`` those between QEMU processes; ``pause`` is what the guest itself sees;
``report`` has the arithmetic and the tables, ``picture`` the drawing.
"""
