"""QEMU's numbers under QEMU's names, and the limits this package puts on what it reads.

Everything in the stream is big-endian, except the bitmaps of a mapped-ram file (host order).
"""

from __future__ import annotations

from typing import Final

from uringmig.units import MiB

# migration/qemu-file.h, migration/savevm.c: the frame of every migration stream.
QEMU_VM_FILE_MAGIC: Final = 0x5145564D
QEMU_VM_FILE_VERSION: Final = 3

# migration/savevm.h: the byte that opens an item.
QEMU_VM_EOF: Final = 0x00
QEMU_VM_SECTION_START: Final = 0x01
QEMU_VM_SECTION_PART: Final = 0x02
QEMU_VM_SECTION_END: Final = 0x03
QEMU_VM_SECTION_FULL: Final = 0x04
QEMU_VM_SUBSECTION: Final = 0x05
QEMU_VM_VMDESCRIPTION: Final = 0x06
QEMU_VM_CONFIGURATION: Final = 0x07
QEMU_VM_COMMAND: Final = 0x08
QEMU_VM_SECTION_FOOTER: Final = 0x7E

SECTION_NAMES: Final = {
    QEMU_VM_SECTION_START: "START",
    QEMU_VM_SECTION_PART: "PART",
    QEMU_VM_SECTION_END: "END",
    QEMU_VM_SECTION_FULL: "FULL",
}

# migration/savevm.c, enum qemu_vm_cmd.
MIG_CMD_OPEN_RETURN_PATH: Final = 1
MIG_CMD_PING: Final = 2
MIG_CMD_POSTCOPY_ADVISE: Final = 3
MIG_CMD_SWITCHOVER_START: Final = 11

COMMAND_NAMES: Final = {
    MIG_CMD_OPEN_RETURN_PATH: "OPEN_RETURN_PATH",
    MIG_CMD_PING: "PING",
    MIG_CMD_POSTCOPY_ADVISE: "POSTCOPY_ADVISE",
    4: "POSTCOPY_LISTEN",
    5: "POSTCOPY_RUN",
    6: "POSTCOPY_RAM_DISCARD",
    7: "PACKAGED",
    8: "ENABLE_COLO",
    9: "POSTCOPY_RESUME",
    10: "RECV_BITMAP",
    MIG_CMD_SWITCHOVER_START: "SWITCHOVER_START",
}
#: Payload bytes of each command that is accepted; every other command is refused.
COMMAND_PAYLOAD_BYTES: Final = {
    MIG_CMD_OPEN_RETURN_PATH: 0,
    MIG_CMD_PING: 4,
    MIG_CMD_SWITCHOVER_START: 0,
}

# migration/ram.c: flag bits below the page size in each 64-bit word of the ram section.
RAM_SAVE_FLAG_ZERO: Final = 0x002
RAM_SAVE_FLAG_MEM_SIZE: Final = 0x004
RAM_SAVE_FLAG_PAGE: Final = 0x008
RAM_SAVE_FLAG_EOS: Final = 0x010
RAM_SAVE_FLAG_CONTINUE: Final = 0x020
RAM_SAVE_FLAG_XBZRLE: Final = 0x040
RAM_SAVE_FLAG_HOOK: Final = 0x080
RAM_SAVE_FLAG_COMPRESS_PAGE: Final = 0x100
RAM_SAVE_FLAG_MULTIFD_FLUSH: Final = 0x200

# migration/ram.c, ram_mig_init(): register_savevm_live("ram", 0, 4, ...).
RAM_IDSTR: Final = "ram"
RAM_INSTANCE_ID: Final = 0
RAM_VERSION_ID: Final = 4

# migration/ram.c, mapped-ram.
MAPPED_RAM_HDR_VERSION: Final = 1
MAPPED_RAM_FILE_OFFSET_ALIGNMENT: Final = 0x100000

# migration/savevm.c, vmstate_configuration: names of its subsections, each of version 1.
CONFIGURATION_PAGE_BITS: Final = "configuration/target-page-bits"
CONFIGURATION_CAPABILITIES: Final = "configuration/capabilities"
CONFIGURATION_UUID: Final = "configuration/uuid"
CONFIGURATION_SUBSECTION_VERSION: Final = 1
UUID_BYTES: Final = 16
#: log2 of options.PAGE_SIZE, the only target page size that is handled.
TARGET_PAGE_BITS: Final = 12

CAPABILITY_MAPPED_RAM: Final = "mapped-ram"
CAPABILITY_IGNORE_SHARED: Final = "x-ignore-shared"
#: qapi/migration.json, MigrationCapability, of QEMU 7.2 to 10.2. A loader refuses other names.
KNOWN_CAPABILITIES: Final = frozenset(
    (
        "xbzrle", "rdma-pin-all", "auto-converge", "zero-blocks", "compress", "events",
        "postcopy-ram", "x-colo", "release-ram", "block", "return-path",
        "pause-before-switchover", "multifd", "dirty-bitmaps", "postcopy-blocktime",
        "late-block-activate", CAPABILITY_IGNORE_SHARED, "validate-uuid", "background-snapshot",
        "zero-copy-send", "postcopy-preempt", "switchover-ack", "dirty-limit",
        CAPABILITY_MAPPED_RAM,
    )
)  # fmt: skip

#: A name is one length byte and that many bytes.
IDSTR_MAX: Final = 255
#: QEMU has no limit; its longest machine name has 27 characters.
MACHINE_NAME_MAX: Final = 255
#: QEMU 10.2 has 22 capabilities.
CAPABILITIES_MAX: Final = 64
#: A guest with 256 DIMMs and an option ROM on each of 512 devices has fewer than 1000 blocks.
BLOCKS_MAX: Final = 4096
#: x86 physical addresses have at most 52 bits; also keeps every sum within int64.
RAM_BYTES_MAX: Final = 1 << 52
#: File offsets are signed 64-bit numbers (off_t).
FILE_OFFSET_MAX: Final = (1 << 63) - 1
#: Device state is a few MiB at most without VFIO, which is refused; it is held in memory.
TAIL_BYTES_MAX: Final = 256 * MiB
#: PART sections and commands of one stream: QEMU writes some 20 a second while it iterates, so
#: this is half a day. A hostile stream could hold nothing else, and each becomes an event.
ITEMS_MAX: Final = 1 << 20
#: A q35 guest with 30 devices has 100 KiB of JSON; this is two orders of magnitude more.
VMDESCRIPTION_BYTES_MAX: Final = 32 * MiB
#: JSON objects in one vmdescription (a q35 guest has 2,000): bounds the memory to decode it.
VMDESCRIPTION_OBJECTS_MAX: Final = 1 << 18
#: Subsections within subsections; QEMU's own reach 3.
SUBSECTION_DEPTH_MAX: Final = 16
#: Memory in a guest's physical addresses: each DIMM and BAR is a range, and firmware cuts more.
MAPPED_RANGES_MAX: Final = 1 << 16
