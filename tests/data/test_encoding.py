"""When Ctrl-C arrives while processes start, only their parent gets it, and only after they have started."""

import os
import signal
import threading
import time

import pytest

from rmkv_cli.data.encoding import without_ctrl_c


def test_ctrl_c_is_delivered_after_the_block_even_through_another_thread():
    ended, reached = threading.Event(), []
    other = threading.Thread(target=ended.wait)
    other.start()  # it blocks no signal
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            start(reached)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
        ended.set()
        other.join()
    assert reached


def start(reached):
    """Be a block in which Ctrl-C comes."""
    with without_ctrl_c():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)  # in which a handler would run
        reached.append(True)
