"""The sidecar: read back as written, and anything else refused as bytes that are wrong."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uringmig.errors import FormatError
from uringmig.image import digest, manifest
from uringmig.image.guestfacts import DiskFile, GuestDisk, GuestFacts, MapRange

SAMPLE = manifest.Manifest(
    created="2026-01-01T00:00:00+00:00",
    writer="uringmig",
    machine="pc-q35-10.0",
    base=4096,
    file_size=2 << 20,
    stream_digest="ab" * 16,
    blocks=[
        manifest.ManifestBlock(
            idstr="pc.ram",
            used_length=8 << 20,
            bitmap_offset=200,
            pages_offset=1 << 20,
            pages_set=17,
            digests=["00" * 16, "ff" * 16],
        )
    ],
    settings=manifest.Settings(
        engine="pwrite",
        direct=True,
        channels=2,
        depth=8,
        block_size=1 << 20,
        bridge=16 << 10,
        rate=0,
    ),
    seconds={"sync": 0.5},
    notes=["using pwrite"],
)


def as_json() -> dict[str, Any]:
    text: dict[str, Any] = json.loads(manifest.encode(SAMPLE))
    return text


def test_manifest_is_read_back_as_written() -> None:
    assert manifest.decode(manifest.encode(SAMPLE)) == SAMPLE


def test_fields_of_an_archive_are_read_back_and_left_out_where_there_are_none() -> None:
    assert "archive" not in as_json()
    fields = manifest.ArchiveFields(
        name="web1-1",
        vm="web1",
        tier="hot",
        host="node1",
        source_kind="qmp",
        source_path="/run/web1.sock",
        source_fingerprint="",
        content_digest="cd" * 16,
        memory_bytes=8 << 20,
        stored_bytes=17 << 12,
    )
    entry = msgspec.structs.replace(SAMPLE, archive=fields)
    assert manifest.decode(manifest.encode(entry)).archive == fields


CONTENT: dict[str, Any] = {
    "machine": "q35",
    "blocks": [("a", 4096, [b"x" * 16]), ("b", 8192, [b"y" * 16, b"z" * 16])],
    "device_state": b"state",
}


@pytest.mark.parametrize(
    "change",
    [
        {"machine": "pc"},
        {"device_state": b"stats"},
        {"blocks": CONTENT["blocks"][:1]},
        {"blocks": CONTENT["blocks"][::-1]},
        {"blocks": [("a", 4096, [b"x" * 16, b"y" * 16]), ("b", 8192, [b"z" * 16])]},
        {"blocks": [("a", 4097, [b"x" * 16]), CONTENT["blocks"][1]]},
        {"blocks": [("ab", 4096, [b"x" * 16]), CONTENT["blocks"][1]]},
    ],
)
def test_content_digest_changes_with_every_part(change: dict[str, Any]) -> None:
    assert digest.content_digest(**CONTENT) == digest.content_digest(**CONTENT)
    assert digest.content_digest(**CONTENT | change) != digest.content_digest(**CONTENT)


def test_manifest_is_json_with_its_format_and_version() -> None:
    text = as_json()
    assert (text["format"], text["version"]) == ("uringmig-manifest", 1)
    assert (text["digest"], text["digest_bytes"]) == ("xxh3-128", 4 << 20)
    assert manifest.encode(SAMPLE).endswith(b"\n")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", "other"),
        ("version", 4),
        ("version", 0),
        ("digest", "md5"),
        ("digest_bytes", 1 << 20),
    ],
)
def test_another_kind_of_manifest_is_refused(name: str, value: object) -> None:
    with pytest.raises(FormatError, match=f"manifest {name}") as caught:
        manifest.decode(json.dumps(as_json() | {name: value}).encode())
    assert caught.value.found == value


def test_a_newer_version_is_told_as_such_whatever_else_it_has() -> None:
    """The version decides before any field does: what a newer one has is not called unknown."""
    text = as_json() | {"version": 4, "format": "uringmig-manifest", "from_the_future": {}}
    with pytest.raises(FormatError, match="manifest version") as caught:
        manifest.decode(json.dumps(text).encode())
    assert (caught.value.expected, caught.value.found) == ("1 to 3", 4)


GUEST = GuestFacts(
    qemu_version="10.0.2",
    qemu_package=None,
    machine="pc-q35-10.0",
    target="x86_64",
    cpu_type="qemu64-x86_64-cpu",
    cpu_count=2,
    kvm=False,
    name=None,
    uuid=None,
    memory_map=[
        MapRange(
            start=0, length=4 << 20, block="pc.ram", offset=0, read_only=False, region="pc.ram"
        ),
        MapRange(
            start=1 << 32, length=4 << 20, block="pc.ram", offset=4 << 20, read_only=True,
            region="pc.ram",
        ),
        MapRange(start=1 << 33, length=4096, block=None, offset=0, read_only=False, region="bar"),
    ],
)  # fmt: skip
WITH_GUEST = msgspec.structs.replace(SAMPLE, guest=GUEST, version=manifest.version_of(GUEST))


def test_facts_of_the_machine_are_read_back_and_make_the_second_version() -> None:
    """Old programs refuse a field they do not know: a manifest has it only under a new version."""
    assert (as_json()["version"], "guest" in as_json()) == (1, False)
    text = json.loads(manifest.encode(WITH_GUEST))
    assert (text["version"], text["guest"]["memory_map"][1]["start"]) == (2, 1 << 32)
    assert manifest.decode(manifest.encode(WITH_GUEST)) == WITH_GUEST
    with pytest.raises(FormatError, match="manifest version"):
        manifest.decode(manifest.encode(msgspec.structs.replace(WITH_GUEST, version=1)))


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (0, {"length": (8 << 20) + 1}, "ends past its block"),
        (1, {"offset": (4 << 20) + 1}, "ends past its block"),
        (1, {"start": 4095}, "begins in the range before it"),
        (0, {"block": "pc.bios"}, "no such block"),
        (0, {"length": 0}, "manifest"),
        (0, {"start": -1}, "manifest"),
        (0, {"start": 1 << 63}, "manifest"),
        (0, {"more": 1}, "manifest"),
    ],
)
def test_a_map_that_does_not_fit_the_image_is_refused(
    number: int, change: dict[str, object], message: str
) -> None:
    """Whoever exports memory by its map may use every range of it as it stands."""
    text = json.loads(manifest.encode(WITH_GUEST))
    text["guest"]["memory_map"][number] |= change
    with pytest.raises(FormatError, match=message):
        manifest.decode(json.dumps(text).encode())


DISK = GuestDisk(
    device="/machine/peripheral/dev0/virtio-backend",
    backend="disk0",
    node="#block123",
    size=1 << 30,
    kept="internal",
    files=[DiskFile(path="/d.qcow2", format="qcow2", inode=7)],
    snapshot="uringmig-1",
    snapshot_id="1",
)
WITH_DISKS = msgspec.structs.replace(
    WITH_GUEST, guest=msgspec.structs.replace(GUEST, disks=[DISK]), version=3
)


def test_disks_are_read_back_and_make_the_third_version() -> None:
    """As with the machine's facts; a machine without disks stays readable for older programs."""
    assert manifest.version_of(WITH_DISKS.guest or None) == 3
    assert "disks" not in json.loads(manifest.encode(WITH_GUEST))["guest"]
    assert manifest.decode(manifest.encode(WITH_DISKS)) == WITH_DISKS
    with pytest.raises(FormatError, match="manifest version"):
        manifest.decode(manifest.encode(msgspec.structs.replace(WITH_DISKS, version=2)))


@pytest.mark.parametrize(
    "change",
    [
        {"kept": "none"},
        {"kept": "external"},
        {"snapshot": None},
        {"overlay": "/o"},
        {"kept": "elsewhere"},
        {"files": []},
        {"files": [{"path": "", "format": None}]},
        {"files": [{"path": "/d", "format": "x" * 256}]},
        {"files": [{"path": "/d", "format": None, "size": -1}]},
        {"size": 1 << 63},
        {"node": 5},
        {"more": 1},
    ],
)
def test_disks_that_contradict_themselves_are_refused(change: dict[str, object]) -> None:
    """Whoever looks for the disks of an image finds each said to be kept in one way."""
    text = json.loads(manifest.encode(WITH_DISKS))
    text["guest"]["disks"][0] |= change
    with pytest.raises(FormatError, match=r"manifest|disk '/machine"):
        manifest.decode(json.dumps(text).encode())


@pytest.mark.parametrize("name", ["created", "base", "file_size", "blocks", "settings"])
def test_missing_field_is_refused_by_its_name(name: str) -> None:
    text = as_json()
    del text[name]
    with pytest.raises(FormatError, match=name):
        manifest.decode(json.dumps(text).encode())


@pytest.mark.parametrize(
    "change",
    [{"base": "0"}, {"blocks": {}}, {"unknown": 1}, {"seconds": {"sync": "long"}}, {"notes": [1]}],
)
def test_field_of_another_type_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(FormatError, match="manifest"):
        manifest.decode(json.dumps(as_json() | change).encode())


@pytest.mark.parametrize("depth", [100, 200_000])
def test_deep_nesting_is_refused(depth: int) -> None:
    with pytest.raises(FormatError, match="manifest"):
        manifest.decode(b'{"notes":' + b"[" * depth)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_the_same_way(data: bytes) -> None:
    with pytest.raises(FormatError, match="manifest"):
        manifest.decode(data)


@given(st.integers(0, 1000), st.binary(max_size=8))
def test_damaged_manifest_is_read_or_refused(at: int, patch: bytes) -> None:
    """Anything but a `FormatError` fails this test, also what a bad name of a field causes."""
    data = bytearray(manifest.encode(SAMPLE))
    at %= len(data)
    data[at : at + len(patch)] = patch
    with contextlib.suppress(FormatError):
        manifest.decode(bytes(data))


def test_name_of_a_field_that_is_no_text_is_refused() -> None:
    with pytest.raises(FormatError, match="manifest"):
        manifest.decode(b'{"\x80ormat": 1}')
