"""What holds for every test: on the CI machine (``CI=true``) nothing may be skipped."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator

import pytest

#: Fixtures of real QEMUs; a module of its own, since two conftest.py are one module to mypy.
pytest_plugins = ["hugepool", "realguest"]

#: A skip says what a machine lacks. The CI machine lacks nothing, so there a skip is a defect.
SKIPS_FAIL = os.environ.get("CI") == "true"


def pytest_configure() -> None:
    """Undo what nohup and a shell's background jobs do: signals that tests send would be ignored.

    The program means to keep ignored what its caller has it ignore, and so do its children.
    """
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.hookimpl(tryfirst=True)  # pytest-xdist's own reads the mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a module's tests in one process, and all that change the pool of huge pages.

    The first for its fixtures; the pool is the machine's, and there is one of it.
    """
    for item in items:
        group = "hugetlb" if "hugetlb" in item.path.name else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if SKIPS_FAIL and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: skipped where CI=true: {_reason(report.longrepr)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if SKIPS_FAIL and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid}: skipped where CI=true: {_reason(report.longrepr)}"
    return report


def _reason(longrepr: object) -> str:
    """The words of a skip: pytest gives (file, line, reason)."""
    return str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)
