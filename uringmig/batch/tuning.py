"""Jobs and profiles: what `bench` measured of an archive's place, where a job file says nothing."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from uringmig.batch.job import Job, JobFile
from uringmig.bench.profile import ProfileSettings, settings_for
from uringmig.options import DirectMode, EngineName


def tune(job_file: JobFile, profiles: Path) -> tuple[JobFile, list[str]]:
    """Apply the profiles of the archives' places to all jobs.

    Args:
        job_file: as parsed; what it gives outright stays.
        profiles: the profile file.

    Returns:
        The tuned job file, and a note for every archive whose place has no profile.

    Raises:
        FormatError: the profile file is malformed.
        StorageError: it, or an archive's place, cannot be looked at.
    """
    archives = dict.fromkeys(job.archive for job in job_file.jobs)
    settings = {archive: settings_for(_existing(archive), profiles) for archive in archives}
    notes = [
        f"{profiles} has no profile of the place of {archive}; the defaults are used there"
        for archive, found in settings.items()
        if found is None
    ]
    jobs = tuple(_tuned(job, settings[job.archive]) for job in job_file.jobs)
    return msgspec.structs.replace(job_file, jobs=jobs), notes


def _tuned(job: Job, settings: ProfileSettings | None) -> Job:
    """Apply one profile to one job."""
    if settings is None:
        return job
    # The channels of a cold job compress: what the disk likes says nothing about them.
    explicit = {*job.given, "channels"} if job.tier == "cold" else {*job.given}
    # What only a profile asks for is no reason to fail: io_uring or O_DIRECT may be gone since.
    engine: EngineName = "auto" if settings.engine == "io_uring" else settings.engine
    direct: DirectMode = "preferred" if settings.direct == "required" else settings.direct
    settings = msgspec.structs.replace(settings, engine=engine, direct=direct)
    options = settings.apply_to(job.options(rate=0), explicit=explicit)
    return msgspec.structs.replace(
        job,
        channels=options.channels,
        depth=options.depth,
        block_size=options.block_size,
        engine=options.engine,
        direct=options.direct,
        bridge=options.bridge,
    )


def _existing(archive: str) -> Path:
    """The archive's folder, or the one above it in which it will be made."""
    path = Path(archive)
    return next((folder for folder in (path, *path.parents) if os.path.isdir(folder)), path)
