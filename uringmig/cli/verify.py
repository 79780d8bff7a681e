"""``uringmig verify``: an image against its manifest; every difference found, one line each."""

from __future__ import annotations

from pathlib import Path

from uringmig.cli import parameters
from uringmig.cli.command import command
from uringmig.cli.session import Session
from uringmig.errors import MismatchError, naming
from uringmig.options import ReadOptions
from uringmig.units import format_size
from uringmig.verify import verify as verify_image


@command(parameters.image_file(), parameters.offset(), *parameters.transfer())
@parameters.takes_options(ReadOptions)
def verify(session: Session, *, file: Path, offset: int, options: ReadOptions) -> int:
    """Check an image's structure, then its bytes against its manifest if there is one."""
    output = session.output
    with naming(file):
        report = verify_image(file, offset=offset, options=options, progress=session.progress)
    missing = report.manifest_path is None
    for note in report.notes:
        # The last note is that there was nothing to compare with, if that is so.
        (output.warn if missing and note == report.notes[-1] else output.note)(note)
    compared = "read" if missing else "compared"
    rate_seen = report.checked_bytes / report.seconds / 1e6 if report.seconds else 0.0
    output.result(
        "verify",
        report,
        [str(mismatch) for mismatch in report.mismatches]
        or [
            f"{report.path}: no damage found, {format_size(report.checked_bytes)} {compared} "
            f"in {report.seconds:.2f} s ({rate_seen:.0f} MB/s)"
        ],
        exit_code=MismatchError.exit_code if report.mismatches else None,
    )
    return MismatchError.exit_code if report.mismatches else output.exit_code
