"""Rows are read a step ahead, and a run that stops has not taken what it did not train on."""

import threading
from itertools import pairwise

import numpy as np
import pytest
from small_documents import make_documents, random_documents

from rmkv_cli.data.lanes import EndOfData, Lanes, Prepared, Rows
from rmkv_cli.training.prefetch import PrefetchedLanes, pack_rows, unpack_rows

LENGTHS = [5, 8, 3, 13, 8, 8, 1, 21]


def lanes(documents):
    return Lanes(Prepared(documents, 0), 3, 2)


def read(ahead, lengths):
    """Rows of these lengths; each is read while the one before is being used."""
    return [unpack_rows(ahead.next(n, then)) for n, then in zip(lengths, [*lengths[1:], None], strict=True)]


def assert_same_rows(some, others):
    for rows, its in zip(some, others, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(vars(rows).values(), vars(its).values(), strict=True))


@pytest.mark.parametrize("after", range(1, len(LENGTHS)))
def test_a_place_is_behind_the_rows_that_were_returned(after):
    documents = random_documents([4, 9, 30, 2, 17])
    plain = lanes(documents)
    ahead, resumed = (PrefetchedLanes(lanes(documents), pinned=False) for _ in range(2))
    taken = [unpack_rows(ahead.next(n, then)) for n, then in list(pairwise(LENGTHS))[:after]]
    resumed.load_state_dict(ahead.state_dict())
    assert_same_rows([*taken, *read(resumed, LENGTHS[after:])], [plain.next(n) for n in LENGTHS])


def test_the_next_rows_are_read_while_the_last_ones_are_worked_on():
    class Noted:
        """Lanes that note which lengths were read, and by which thread."""

        def __init__(self):
            self.lanes, self.read, self.second = lanes(random_documents([9])), [], threading.Event()
            self.bookmark, self.state_dict = self.lanes.bookmark, self.lanes.state_dict

        def next(self, length):
            rows = self.lanes.next(length)
            self.read.append((length, threading.current_thread() is threading.main_thread()))
            if len(self.read) == 2:
                self.second.set()
            return rows

    noted = Noted()
    ahead = PrefetchedLanes(noted, pinned=False)
    ahead.next(4, 7)
    assert noted.second.wait(60)
    assert noted.read == [(4, True), (7, False)]


def test_the_data_s_end_comes_with_the_rows_that_it_is_in():
    class Ending:
        """Lanes of two rows."""

        def __init__(self):
            self.left = 2

        def bookmark(self):
            return lambda left=self.left: left

        def next(self, length):
            if not self.left:
                raise EndOfData("no more")
            self.left -= 1
            return Rows(*np.zeros((3, 1, length), np.int64))

    ahead = PrefetchedLanes(Ending(), pinned=False)
    ahead.next(4, 4)
    ahead.next(4, 4)
    with pytest.raises(EndOfData, match="no more"):
        ahead.next(4, 4)
    assert ahead.state_dict() == 0


def test_what_is_packed_is_half_the_size_and_unpacked_the_same():
    documents = make_documents([[70_000, 3, 4], [5, 6, 7, 8]], answers=[[(1, 2)], None], vocab_size=1 << 17)
    rows = lanes(documents).next(9)
    assert (rows.targets == -100).any()
    assert pack_rows(rows).nbytes == sum(x.nbytes for x in vars(rows).values()) / 2
    assert_same_rows([unpack_rows(pack_rows(rows))], [rows])
