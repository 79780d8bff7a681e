"""Bytes to values and back, for QEMU's migration stream and mapped-ram files; no I/O here.

FORMAT.md, beside this file, is the specification these modules implement.
"""
