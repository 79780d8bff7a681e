"""Writes the golden files anew with the QEMU installed here: ``python regenerate.py``.

Main memory holds, in every third page from page 1 on, the page's index as little-endian words;
the firmware is a made-up 64 KiB so that the files stay small and carry nobody's code.
"""

from __future__ import annotations

import lzma
import struct
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from qemuprocess import QemuProcess  # noqa: E402  # tests/ is no package

PAGE = 4096
MIB = 1 << 20
UUID = "00112233-4455-6677-8899-aabbccddeeff"
VIRTIO_MEM = (
    "-uuid", UUID,
    "-object", f"memory-backend-ram,id=vm0,size={8 * MIB}",
    "-device", "virtio-mem-pci,id=vmem0,memdev=vm0,requested-size=0",
)  # fmt: skip


def pattern(length: int) -> bytes:
    """Guest memory of the golden files."""
    return b"".join(
        struct.pack("<Q", index) * (PAGE // 8) if index % 3 == 1 else bytes(PAGE)
        for index in range(length // PAGE)
    )


def store(name: str, path: Path) -> None:
    """Keep a file compressed, and make room for the next."""
    packed = lzma.compress(path.read_bytes(), preset=9 | lzma.PRESET_EXTREME)
    (HERE / f"{name}.xz").write_bytes(packed)
    path.unlink()


def main() -> None:
    """Three guests, three files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ram, out, bios = folder / "ram", folder / "out", folder / "bios"
        bios.write_bytes(b"\xf4" * 0x10000)
        ram.write_bytes(pattern(4 * MIB))
        arguments: tuple[str, ...] = ("-bios", str(bios))
        with QemuProcess(folder, ram=ram, arguments=arguments) as qemu:
            qemu.save(f"file:{out}", capabilities=["mapped-ram"])
        store("q35.mig", out)

        arguments += ("-m", "4M,maxmem=1G,slots=2", *VIRTIO_MEM)
        with QemuProcess(folder, ram=ram, machine="pc", arguments=arguments) as qemu:
            qemu.save(
                f"file:{out},offset=0x3001",
                capabilities=["mapped-ram", "multifd", "validate-uuid"],
                direct_io=True,
            )
        store("pc-uuid-virtiomem.mig", out)

        with QemuProcess(folder, ram=ram, arguments=arguments) as qemu:
            qemu.save(f"exec:cat > {out}", capabilities=["x-ignore-shared", "validate-uuid"])
        store("q35-ignore-shared.stream", out)


if __name__ == "__main__":
    main()
