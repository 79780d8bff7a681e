"""QEMU's multifd + mapped-ram + direct-io writer, outside QEMU and on io_uring."""
