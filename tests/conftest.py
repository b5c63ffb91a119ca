"""What all tests share."""

import signal

import pytest
from forked import Forker


@pytest.fixture(autouse=True, scope="session")
def signals_reach_the_commands():
    """What a shell or nohup starts in the background ignores Ctrl-C or a hang-up, and so do the processes it starts."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def forker():
    """Starts processes that have imported what training needs."""
    with Forker("job", "torch._dynamo", "torch.optim") as forker:
        yield forker
