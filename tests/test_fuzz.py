"""Whatever happens to a file that travels between people, it gives the right answer or one line with exit code 2.

Cases are drawn from a seed (fuzz_damage.py) and tried in a process of their own, whose memory and time are bounded. To
repeat one: `python tests/fuzz_child.py FOLDER SEED NUMBER 1 KIND`.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

SEED = 19
RIGHT = {"same", "refused", "another, rightly"}


def outcomes(folder, first, count):
    """Return the outcome of each case, by its kind and number; raise AssertionError with all that are not right."""
    command = [sys.executable, Path(__file__).with_name("fuzz_child.py"), folder, SEED, first, count]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    cases = {}
    for line in map(json.loads, done.stdout.splitlines()):
        # Of two lines a case has, the second replaces the first, unless the case has ended the process.
        ended = f"exit code {done.returncode}\n{done.stderr[-2000:]}"
        case = cases.setdefault((line["kind"], line["number"]), {"outcome": "crash", "said": ended})
        case |= line
    assert cases, done.stderr
    wrong = [case for case in cases.values() if case["outcome"] not in RIGHT]
    assert not wrong, "\n".join(map(str, wrong))
    assert done.returncode == 0, done.stderr
    return {place: case["outcome"] for place, case in cases.items()}


def test_a_few_cases_of_each_kind(tmp_path):
    assert len({kind for kind, _ in outcomes(tmp_path, 0, 2)}) >= 20


@pytest.mark.slow
def test_some_hundred_cases(tmp_path):
    by_outcome = Counter(outcomes(tmp_path, 2, 40).values())
    assert by_outcome["refused"] > 400  # were all refused, or none, the cases would show nothing
    assert by_outcome["same"] > 20
