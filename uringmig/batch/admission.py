"""Which job may begin: by what its disks can still take, not by how many jobs there are.

A job asks each of its disks for as many requests as it keeps in flight, once for reading and once
for writing, so one that copies within a disk asks twice. Jobs are admitted while a disk's depth
holds them all; one that asks for more than the depth gets the disk alone. A depth that the job file
states is a limit, too: a job that asks for more is made to ask for less. A measured one only says
how many jobs go together. A disk with a rate has one job at a time, which gets the whole rate: two
would only share it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from msgspec.structs import replace

from uringmig.batch.job import Job
from uringmig.batch.messages import Estimate

#: Of a disk that is not measured: two jobs with the default options.
DEPTH_OTHERWISE: Final = 32


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a disk takes: requests in flight, and bytes per second (0 is no limit).

    Attributes:
        stated: somebody has said so, so that no job may ask for more.
    """

    depth: int
    rate: int = 0
    stated: bool = False


@dataclass(slots=True)
class Admission:
    """What is in use of every disk; keys are those of `Disk`.

    Attributes:
        allowances: of every disk that is known.
        otherwise: of any other, such as that of a source nobody could look at before.
    """

    allowances: Mapping[str, Allowance]
    otherwise: Allowance = Allowance(DEPTH_OTHERWISE)
    _in_use: dict[str, dict[str, int]] = field(default_factory=dict)

    def fitted(self, job: Job, estimate: Estimate) -> Job:
        """The job with no more requests in flight than the stated depth of its disks.

        One to read and one to write always remain, and a depth of 1 is none for a copy.
        """
        roles = _roles(estimate)
        stated = [self.allowance(key).depth // roles[key] for key in roles
                  if self.allowance(key).stated]  # fmt: skip
        most = max(1, min(stated, default=job.channels * job.depth))
        channels = min(job.channels, most)
        return replace(job, channels=channels, depth=min(job.depth, most // channels))

    def admit(self, job: Job, estimate: Estimate) -> int | None:
        """Take what a job needs, if it is to be had.

        Returns:
            The rate in bytes per second that its disks leave it, 0 for no limit; None: not now.
        """
        wanted = demand(job, estimate)
        if not all(self._fits(key, count) for key, count in wanted.items()):
            return None
        self._in_use[job.name] = wanted
        rates = [self.allowance(key).rate / self._passes(estimate, key) for key in wanted]
        return round(min(filter(None, rates), default=0))

    def release(self, job: Job) -> None:
        """Give back what a job has; harmless if it has nothing."""
        self._in_use.pop(job.name, None)

    def allowance(self, key: str) -> Allowance:
        """What a disk takes."""
        return self.allowances.get(key, self.otherwise)

    def in_flight(self, key: str) -> int:
        """Requests that the admitted jobs may have in flight on a disk."""
        return sum(wanted.get(key, 0) for wanted in self._in_use.values())

    def _fits(self, key: str, count: int) -> bool:
        """Say whether a disk takes so many more requests."""
        taken = self.in_flight(key)
        allowance = self.allowance(key)
        return taken == 0 or (allowance.rate == 0 and taken + count <= allowance.depth)

    @staticmethod
    def _passes(estimate: Estimate, key: str) -> int:
        """How often a job's bytes pass a disk: a copy within it is read and written."""
        return _roles(estimate)[key]


def demand(job: Job, estimate: Estimate) -> dict[str, int]:
    """Requests a job keeps in flight, by disk."""
    return {key: count * job.channels * job.depth for key, count in _roles(estimate).items()}


def _roles(estimate: Estimate) -> Counter[str]:
    """How many of the two, source and archive, lie on each disk."""
    return Counter(disk.key for disk in (*estimate.source_disks, *estimate.archive_disks))
