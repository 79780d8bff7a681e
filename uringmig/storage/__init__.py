"""The only code that opens storage descriptors; it moves bytes at offsets and knows no QEMU."""
