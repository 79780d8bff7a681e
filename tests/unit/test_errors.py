"""Errors: who is at fault, the exit code that goes with it, and one line for an operator."""

from __future__ import annotations

import errno
import pickle
from importlib import import_module
from pkgutil import walk_packages

import pytest

import uringmig
from uringmig.errors import (
    BusyError,
    BytesError,
    FormatError,
    HostError,
    MismatchError,
    PeerError,
    StateError,
    StorageError,
    StorageLimitError,
    UringmigError,
)
from uringmig.qemu.qmp import CommandError


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (StateError, 2),
        (FormatError, 3),
        (MismatchError, 3),
        (PeerError, 4),
        (BusyError, 4),
        (StorageError, 5),
        (HostError, 6),
    ],
)
def test_exit_code_is_the_contract_s(kind: type[UringmigError], code: int) -> None:
    error = kind("what")
    assert isinstance(error, UringmigError)
    assert error.exit_code == code
    assert str(error) == "what"


def test_difference_and_bad_format_are_both_about_bytes() -> None:
    assert issubclass(FormatError, BytesError)
    assert issubclass(MismatchError, BytesError)
    assert not issubclass(FormatError, MismatchError)


def test_format_error_names_block_offset_expected_and_found() -> None:
    error = FormatError("page_size", offset=0x40, block="pc.ram", expected=4096, found=0)
    assert str(error) == "ramblock 'pc.ram': page_size at offset 0x40 (expected 4096, found 0)"
    assert (error.what, error.offset, error.block) == ("page_size", 0x40, "pc.ram")
    assert (error.expected, error.found) == (4096, 0)


def test_format_error_leaves_out_what_is_not_known() -> None:
    assert str(FormatError("magic", found=3)) == "magic (found 3)"
    assert str(FormatError("magic", offset=0)) == "magic at offset 0x0"


def test_storage_error_names_file_offset_cause_and_cure() -> None:
    error = StorageError(
        "write failed", errno=errno.ENOSPC, path="/a/b", offset=4096, cure="make room"
    )
    assert str(error) == (
        "/a/b: write failed at offset 0x1000: No space left on device (ENOSPC); make room"
    )
    assert (error.errno, error.path, error.offset) == (errno.ENOSPC, "/a/b", 4096)


def test_storage_error_takes_a_number_without_a_name() -> None:
    assert "(9999)" in str(StorageError("write failed", errno=9999))


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (PeerError("not shared"), False),
        (BusyError("taken"), True),
        (StateError("no"), False),
        (FormatError("magic"), False),
        (HostError("no ring"), False),
        (StorageError("no O_DIRECT"), False),
        (StorageError("locked", errno=errno.EAGAIN), True),
        (StorageError("full", errno=errno.ENOSPC), False),
        (StorageError("broken", errno=errno.EIO), False),
    ],
)
def test_error_knows_whether_it_may_pass(error: UringmigError, passes: bool) -> None:
    assert error.may_pass is passes


def kinds_of(base: type[UringmigError]) -> set[type[UringmigError]]:
    """The package's own: another test of this process may have imported the harness's, too."""
    kinds = {base}.union(*(kinds_of(kind) for kind in base.__subclasses__()))
    return {kind for kind in kinds if kind.__module__.startswith("uringmig.")}


def test_every_error_crosses_to_another_process() -> None:
    """A worker's error is its runner's: the same class, line and attributes."""
    special = {
        CommandError: CommandError("cont", "not now"),
        StorageLimitError: StorageError("cannot open", errno=errno.EMFILE, path="/a"),
    }
    for module in walk_packages(uringmig.__path__, "uringmig."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    for kind in kinds_of(UringmigError):
        error = special.get(kind) or kind("it failed")
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), vars(copy)) == (kind, str(error), vars(error))
