"""Admission: what disks can take, never exceeded, and nobody waits for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from uringmig.batch.admission import Admission, Allowance, demand
from uringmig.batch.job import Job, parse_jobs
from uringmig.batch.messages import Disk, Estimate

A, B = (Disk(host="h", name=name, requests_max=256) for name in "ab")


def make_job(name: str, *, channels: int = 2, depth: int = 8) -> Job:
    text = (
        f'[[jobs]]\nname = "{name}"\narchive = "/a"\nsource = {{ image = "x" }}\n'
        f"channels = {channels}\ndepth = {depth}\n"
    )
    return parse_jobs(text, path="/j.toml").jobs[0]


def estimate(source: tuple[Disk, ...], archive: tuple[Disk, ...]) -> Estimate:
    return Estimate(
        kind="mapped-ram", memory_bytes=1, stored_bytes=1, file_bytes=1, fingerprint="",
        source_disks=source, archive_disks=archive,
    )  # fmt: skip


COPY = estimate((A,), (B,))
WITHIN = estimate((A,), (A,))
LIVE = estimate((), (A,))


def test_demand_counts_both_ends() -> None:
    job = make_job("x")
    assert demand(job, COPY) == {"h:a": 16, "h:b": 16}
    assert demand(job, WITHIN) == {"h:a": 32}
    assert demand(job, LIVE) == {"h:a": 16}


def test_as_many_as_the_depth_holds() -> None:
    admission = Admission({"h:a": Allowance(40)})
    jobs = [make_job(name) for name in "xyz"]
    assert [admission.admit(job, LIVE) for job in jobs] == [0, 0, None]
    admission.release(jobs[0])
    admission.release(jobs[0])
    assert admission.admit(jobs[2], LIVE) == 0
    assert admission.in_flight("h:a") == 32


def test_a_copy_within_a_disk_counts_twice() -> None:
    admission = Admission({"h:a": Allowance(40)})
    assert admission.admit(make_job("x"), WITHIN) == 0
    assert admission.admit(make_job("y"), WITHIN) is None


def test_one_that_wants_more_than_there_is_gets_the_disk_alone() -> None:
    admission = Admission({"h:a": Allowance(8)})
    first, second = make_job("x"), make_job("y")
    assert admission.admit(first, LIVE) == 0
    assert admission.admit(second, LIVE) is None
    admission.release(first)
    assert admission.admit(second, LIVE) == 0


def test_a_stated_depth_is_never_passed() -> None:
    """A job that asks for more is made smaller; a measured depth leaves it as it is."""
    stated = Admission({"h:a": Allowance(16, stated=True)})
    small = stated.fitted(make_job("x", channels=2, depth=16), WITHIN)
    assert (small.channels, small.depth) == (2, 4)
    assert stated.admit(small, WITHIN) == 0
    assert stated.in_flight("h:a") == 16
    assert stated.fitted(make_job("y", channels=2, depth=4), WITHIN).depth == 4
    few = Admission({"h:a": Allowance(3, stated=True)}).fitted(make_job("z", channels=4), LIVE)
    assert (few.channels, few.depth) == (3, 1)
    measured = Admission({"h:a": Allowance(16)})
    assert measured.fitted(make_job("x", depth=16), WITHIN).depth == 16


def test_other_disks_do_not_matter() -> None:
    admission = Admission({"h:a": Allowance(16), "h:b": Allowance(16)})
    assert admission.admit(make_job("x"), LIVE) == 0
    assert admission.admit(make_job("y"), estimate((), (B,))) == 0
    assert admission.admit(make_job("z"), estimate((), ())) == 0


def test_a_limited_disk_has_one_job_which_gets_the_whole_rate() -> None:
    admission = Admission({"h:a": Allowance(256, rate=1000), "h:b": Allowance(256, rate=400)})
    assert admission.admit(make_job("x"), LIVE) == 1000
    assert admission.admit(make_job("y"), LIVE) is None
    assert admission.admit(make_job("z"), estimate((), (B,))) == 400


def test_a_copy_within_a_limited_disk_passes_it_twice() -> None:
    admission = Admission({"h:a": Allowance(256, rate=1000)})
    assert admission.admit(make_job("x"), WITHIN) == 500


@given(
    st.lists(
        st.tuples(
            st.sampled_from([COPY, WITHIN, LIVE, estimate((B,), (A,))]),
            st.integers(1, 4),
            st.integers(1, 16),
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 100),
    st.data(),
)
def test_depth_holds_and_all_get_their_turn(
    wishes: list[tuple[Estimate, int, int]], depth: int, data: st.DataObject
) -> None:
    admission = Admission({"h:a": Allowance(depth), "h:b": Allowance(depth)})
    waiting = [
        (make_job(f"j{number}", channels=channels, depth=each), wish)
        for number, (wish, channels, each) in enumerate(wishes)
    ]
    running: list[tuple[Job, Estimate]] = []
    while waiting or running:
        begun = [pair for pair in waiting if admission.admit(*pair) is not None]
        waiting = [pair for pair in waiting if pair not in begun]
        running += begun
        for key in ("h:a", "h:b"):
            users = [job for job, wish in running if key in demand(job, wish)]
            assert admission.in_flight(key) <= depth or len(users) == 1
        assert running, "nobody runs and somebody waits"
        job, _ = running.pop(data.draw(st.integers(0, len(running) - 1)))
        admission.release(job)
    assert admission.in_flight("h:a") == admission.in_flight("h:b") == 0
