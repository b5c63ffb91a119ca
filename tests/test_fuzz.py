"""A damaged file gives the right result, or one line and exit code 2.

A seed determines the cases (fuzz_damage.py). A separate process with bounded memory and time tries them. To repeat one,
run `python tests/fuzz_child.py FOLDER SEED NUMBER 1 KIND`.
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
    """Return the outcome of each case by kind and number; raise AssertionError that lists the wrong ones."""
    command = [sys.executable, Path(__file__).with_name("fuzz_child.py"), folder, SEED, first, count]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    cases = {}
    for line in map(json.loads, done.stdout.splitlines()):
        # A case's second line replaces its first one; a case that crashed the process has no second line.
        ended = f"exit code {done.returncode}\n{done.stderr[-2000:]}"
        case = cases.setdefault((line["kind"], line["number"]), {"outcome": "crash", "said": ended})
        case |= line
    assert cases, done.stderr
    wrong = [case for case in cases.values() if case["outcome"] not in RIGHT]
    assert not wrong, "\n".join(map(str, wrong))
    assert done.returncode == 0, done.stderr
    return {place: case["outcome"] for place, case in cases.items()}


@pytest.mark.slow
def test_some_hundred_cases(tmp_path):
    found = outcomes(tmp_path, 0, 42)
    assert len({kind for kind, _ in found}) >= 20
    by_outcome = Counter(found.values())
    assert by_outcome["refused"] > 400  # were all refused, or none, the cases would show nothing
    assert by_outcome["same"] > 20
