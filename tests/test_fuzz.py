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


def outcomes(folder, first, count, *kinds):
    """Return (kind, number, what was done, outcome, what was said) of each case; a crash is an outcome."""
    told, wanted = [], [(first, count, kinds)]
    while wanted:
        start, cases, only = wanted.pop()
        command = [sys.executable, Path(__file__).with_name("fuzz_child.py"), folder, SEED, start, cases, *only]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        ends = {(line["kind"], line["number"]): line for line in lines if "outcome" in line}
        for line in lines:
            if "done" in line:
                case = line["kind"], line["number"]
                end = ends.get(case, {"outcome": f"exit code {done.returncode}", "said": done.stderr[-2000:]})
                told.append((*case, line["done"], end["outcome"], end["said"]))
        if done.returncode:
            assert lines, done.stderr
            kind, number = lines[-1]["kind"], lines[-1]["number"]
            later = only[only.index(kind) + 1 :] if only else ()
            assert only, f"{kind} {number}: exit code {done.returncode}\n{done.stderr}"
            wanted += [(first, count, later)] if later else []
            rest = start + cases - number - 1
            wanted += [(number + 1, rest, (kind,))] if rest else []
    return told


def assert_right(told):
    wrong = [case for case in told if case[3] not in RIGHT]
    assert not wrong, "\n".join(map(str, wrong))


def test_a_few_cases_of_each_kind(tmp_path):
    told = outcomes(tmp_path, 0, 4)
    assert_right(told)
    assert len({kind for kind, *_ in told}) >= 15


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_some_hundred_cases_of_each_kind(tmp_path):
    told = outcomes(tmp_path, 4, 120)
    assert_right(told)
    by_kind = Counter((kind, outcome) for kind, _, _, outcome, _ in told)
    print(*(f"{kind}: {outcome}: {number}" for (kind, outcome), number in sorted(by_kind.items())), sep="\n")
