"""``uringmig archive reindex``: the catalogue made anew from the manifests."""

from __future__ import annotations

from pathlib import Path

from uringmig.archive.directory import reindex as reindex_archive
from uringmig.cli import parameters
from uringmig.cli.command import command
from uringmig.cli.session import Session


@command(parameters.archive_folder())
def reindex(session: Session, *, archive: Path) -> int:
    """Make an archive's catalogue anew from its manifests; the old one may be damaged."""
    output = session.output
    report = reindex_archive(archive)
    for problem in report.problems:
        output.warn(problem)
    lines = [
        f"{report.path}: {report.entries} entries in the catalogue, {len(report.problems)} "
        f"problems with files; {report.kept_verification} keep what verification had found"
    ]
    if report.set_aside:
        lines.append(f"the old catalogue could not be used, it is now {report.set_aside}")
    output.result("archive reindex", report, lines)
    return output.exit_code
