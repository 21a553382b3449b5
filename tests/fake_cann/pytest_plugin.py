"""`pytest -p tests.fake_cann.pytest_plugin`: starts the fake device before anything imports torch.

After the tests, the budgets they measured are printed: what each step or call did on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests import fake_cann
from tests.fake_cann import control

fake_cann.start()

_ledger: list[tuple[str, dict[str, int]]] = []

Ledger = Callable[[str, control.Counts], None]


@pytest.fixture
def ledger() -> Ledger:
    """`ledger("decode step", counts)` puts a measured budget into the log of the run."""

    def write(what: str, counts: control.Counts) -> None:
        _ledger.append((what, counts.calls()))

    return write


@pytest.fixture(autouse=True)
def _every_test_finds_an_idle_device() -> Iterator[None]:
    """Whatever order or failure a test left behind, the next starts in program order with nothing queued."""
    yield
    control.forget_failure()
    control.set_timeout_ms(20_000)
    control.set_order("program")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _ledger:
        return
    terminalreporter.section("what the fake device was asked for")
    for what, calls in _ledger:
        terminalreporter.write_line(f"{what}: " + (", ".join(f"{name} {n}" for name, n in calls.items()) or "nothing"))
