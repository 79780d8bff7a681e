"""numpy over pages: zero pages, bitmaps and runs; no bytes on disk, no QEMU, no I/O."""
