"""The Engine protocol: one channel's way to move bytes between memory and a descriptor.

The contract, which one conformance suite checks on every engine:

- An engine belongs to the thread that made it (io_uring's SINGLE_ISSUER wants that) and to one
  descriptor and one direction.
- ``submit`` hands requests over now; at most ``depth`` are in flight at any time. The memory of a
  request stays mapped and, when writing, unchanged until its completion: the caller's duty, also
  after an error. Requests in flight together must not overlap in the file: nothing orders them.
- ``reap`` waits until ``wait_count`` results are there (or the timeout, a signal, or nothing is in
  flight) and returns all there are, in any order. A result is the bytes moved, which may be fewer
  than asked, or ``-errno``. A failed request is a result, never an exception.
- ``close`` is called with nothing in flight, in the thread that made the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Protocol

from uringmig.storage.requests import Completions, IoBatch


class Operation(Enum):
    """Which way the bytes go."""

    READ = "read"
    WRITE = "write"


class Engine(Protocol):
    """See the module docstring for the contract."""

    depth: int

    def submit(self, batch: IoBatch) -> None:
        """Start the requests of ``batch``.

        Raises:
            StorageError: the kernel takes no requests at all (not: a request failed).
        """

    def reap(self, *, wait_count: int, timeout_ns: int) -> Completions:
        """Collect results, after waiting for ``wait_count`` of them at most ``timeout_ns``."""

    def close(self) -> None:
        """Give back what the engine holds."""


#: Makes an engine for (descriptor, direction, depth) in the thread that will use it.
EngineFactory = Callable[[int, Operation, int], Engine]
