"""A running QEMU: its QMP socket, its device state, its shared RAM."""
