"""The time of a run, of which entries get names: no two runs of one job file have the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from batchjobs import job, make_image, write_jobs

from uringmig.batch.job import parse_jobs
from uringmig.batch.ledger import Ledger, time_after
from uringmig.units import MiB

NOON = 1_800_014_400.0


@pytest.mark.parametrize(
    ("later_s", "former", "time"),
    [
        (0.0, None, "20270115T120000Z"),
        (0.9, "20270115T120000Z", "20270115T120001Z"),
        (0.9, "20270115T120007Z", "20270115T120008Z"),
        (1.0, "20270115T120000Z", "20270115T120001Z"),
        (90.0, "20270115T120000Z", "20270115T120130Z"),
        (0.0, "20990115T120000Z", "20270115T120000Z"),
        (0.0, "of another version", "20270115T120000Z"),
    ],
)
def test_a_run_is_later_than_the_one_before(later_s: float, former: str | None, time: str) -> None:
    """Unless that one's clock was plainly wrong."""
    assert time_after(NOON + later_s, former) == time


def test_runs_that_begin_in_one_second(tmp_path: Path) -> None:
    """Each has names of its own, so none finds its entries made by another and makes none."""
    make_image(tmp_path / "vm.mig", size=MiB)
    path = write_jobs(tmp_path, job("vm", f"image = '{tmp_path / 'vm.mig'}'"))
    text = path.read_text()
    times = []
    for _ in range(4):
        job_file = parse_jobs(text, path=str(path))
        with Ledger(job_file, text=text, write=True, resume_within_s=0) as ledger:
            times.append(ledger.time)
            ledger.end()
    assert times == sorted(set(times))
