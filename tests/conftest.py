"""Fixtures that all tests share."""

import signal

import pytest
from forked import Forker


@pytest.fixture(autouse=True, scope="session")
def signals_reach_the_commands():
    """Restore the default signal handlers, which child processes inherit.

    Processes that a shell or nohup starts in the background ignore Ctrl-C or a hang-up.
    """
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def forker():
    """Starts processes that have imported what training needs, and generate short samples."""
    with Forker("job", "short_samples", "torch._dynamo", "torch.optim") as forker:
        yield forker
