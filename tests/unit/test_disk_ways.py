"""What QEMU calls a disk's file, and which disks can be kept which way: by what it says alone."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uringmig.errors import StateError
from uringmig.image.guestfacts import DiskFile, GuestDisk
from uringmig.qemu.disknodes import DiskNode, plain_name
from uringmig.qemu.diskway import DisksWay, why_not

FILE = {"driver": "file", "filename": "/d"}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("/d.qcow2", "/d.qcow2"),
        ("d.qcow2", "d.qcow2"),
        ("a/b:c", "a/b:c"),
        ("/a:b", "/a:b"),
        ("file:/d", "/d"),
        ("json:" + json.dumps({"driver": "qcow2", "file": FILE}), "/d"),
        ("json:" + json.dumps(FILE), "/d"),
        ('json:{"driver": "qcow2", "file.driver": "file", "file.filename": "/d"}', "/d"),
        ('json:{"file": {"driver": "host_device", "filename": "/dev/x"}}', "/dev/x"),
        # Not files.
        ("nbd://host/name", None),
        ("nbd+unix:///name?socket=x", None),
        ("rbd:pool/name", None),
        ("null-co://", None),
        ("", None),
        ('json:{"driver": "nbd", "path": "/d"}', None),
        ('json:{"driver": "qcow2", "file": {"driver": "nbd", "filename": "/d"}}', None),
        ('json:{"driver": "qcow2", "file.driver": "nbd", "file.filename": "/d"}', None),
        ('json:{"driver": "quorum", "children": []}', None),
        ('json:{"file": 3}', None),
        ("json:[]", None),
        ("json:", None),
        ("json:{" + "[" * 100_000, None),
    ],
)  # fmt: skip
def test_names_of_files_are_told_from_others(name: str, path: str | None) -> None:
    """Only a plain file or block device is one that can be named again later."""
    assert plain_name(name) == path


@given(st.text() | st.text().map("json:{}".format))
def test_any_name_is_a_file_or_not(name: str) -> None:
    assert plain_name(name) is None or isinstance(plain_name(name), str)


DISK = DiskNode(
    facts=GuestDisk(
        device="/machine/peripheral/dev0/virtio-backend", backend="d", node="n", size=1,
        kept="none", files=[DiskFile(path="/d", format="qcow2")],
    ),
    device_type="virtio-blk-device",
    driver="qcow2",
    named=True,
    info={"image": {}},
)  # fmt: skip
WAYS = [DisksWay("internal"), DisksWay("external", "/over")]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"info": {}, "device_type": "vhost-user-blk-pci"}, "another process"),
        ({"info": {"active": False}}, "given it away"),
        ({"device_type": "scsi-block"}, "passes the guest's commands through"),
        ({"device_type": "scsi-generic"}, "passes the guest's commands through"),
        ({"named": False}, "no file of that name"),
    ],
)
def test_what_is_kept_neither_way(way: DisksWay, change: dict[str, Any], reason: str) -> None:
    """Devices that this machine has not; real disks are in tests/interop/test_disk_kinds.py."""
    assert why_not(DISK, way) is None
    changed = {name: getattr(DISK, name) for name in DISK.__slots__} | change
    assert reason in (why_not(DiskNode(**changed), way) or "")


def test_a_name_too_long_for_an_overlay_is_refused() -> None:
    """QEMU's header has 1023 bytes for it; an internal snapshot names nothing."""
    facts = msgspec.structs.replace(
        DISK.facts, files=[DiskFile(path="/" + "ä" * 512, format="raw")]
    )
    changed = {name: getattr(DISK, name) for name in DISK.__slots__} | {"facts": facts}
    internal, external = (why_not(DiskNode(**changed), way) for way in WAYS)
    assert internal is None
    assert external is not None
    assert "1023 bytes" in external


@pytest.mark.parametrize("text", ["external=/a", "external=/a/../a", "external=/a/"])
def test_a_folder_is_taken_as_an_absolute_path(text: str) -> None:
    assert DisksWay.parse(text) == DisksWay("external", "/a")


@pytest.mark.parametrize("text", ["external", "external=", "External=/a", "internal ", "", "yes"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(StateError, match="expected none, internal or external=DIR"):
        DisksWay.parse(text)


def test_a_folder_that_qemu_cannot_be_told_is_refused() -> None:
    with pytest.raises(StateError, match="cannot be told"):
        DisksWay.parse("external=/a\udc80")
