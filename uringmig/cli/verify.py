"""``uringmig verify``: an image against its manifest; every difference found, one line each."""

from __future__ import annotations

import typer

from uringmig.cli import parameters
from uringmig.cli.session import session_of
from uringmig.errors import MismatchError, naming
from uringmig.options import ReadOptions
from uringmig.units import format_size
from uringmig.verify import verify as verify_image


@parameters.takes_options(ReadOptions)
def verify(
    context: typer.Context,
    file: parameters.ImageFile,
    offset: parameters.Offset = 0,
    *,
    options: ReadOptions,
    json: parameters.Json = False,
    quiet: parameters.Quiet = False,
    verbose: parameters.Verbose = False,
) -> None:
    """Check an image's structure, then its bytes against its manifest if there is one."""
    session = session_of(context, json=json, quiet=quiet, verbose=verbose)
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
    raise typer.Exit(MismatchError.exit_code if report.mismatches else output.exit_code)
