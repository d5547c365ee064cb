"""What every test shares: Hypothesis without a clock, and the rule that nothing is skipped quietly in CI."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from pathlib import Path

import hypothesis
import pytest

pytest_plugins = ["tests.stores.fixtures"]

hypothesis.settings.register_profile("everstep", deadline=None, print_blob=True)
hypothesis.settings.load_profile("everstep")

# as from a terminal, also where the tests were started in the background, by nohup or a shell without job control
for _signum, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_signum) is signal.SIG_IGN:
        signal.signal(_signum, _handler)


#: what takes long: first, or the last one of them would leave all processes but one with nothing to do
SLOW = ("e2e", "trainers", "packaging", "deploy", "faults")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first. The scheduler (``--dist loadgroup``) begins with the groups, the largest first."""
    here = Path(__file__).parent
    items.sort(key=lambda item: item.path.relative_to(here).parts[0] not in SLOW)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With CI=true, a skip fails unless the test is marked ``may_skip(reason)``; an expected failure is no skip."""
    report = yield
    forbidden = os.environ.get("CI") == "true" and item.get_closest_marker("may_skip") is None
    if report.skipped and forbidden and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where it must run: {report.longreprtext}"
    return report
