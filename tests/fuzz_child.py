"""Run cases of the fuzzer in a process that may crash: `python fuzz_child.py FOLDER SEED FIRST COUNT [KIND...]`.

It tries the cases FIRST to FIRST + COUNT - 1 of each kind and reports each outcome in a line of JSON. A case that began
but has no outcome crashed the process.
"""

import faulthandler
import json
import os
import resource
import shutil
import signal
import sys
import warnings
from pathlib import Path

from fuzz_damage import damage, draw
from fuzz_kinds import Kinds

from rmkv_cli.errors import UserError, one_line

CPU, WALL = 20, 120  # seconds that a case may take: enough for any, on a busy machine too
ROOM = 3 << 30  # bytes that a case may allocate


class Late(BaseException):
    """The error of a case that takes too long."""


def late(*_):
    raise Late


def attempt(read):
    """Return the outcome of reading a file, and the message or the result."""
    signal.setitimer(signal.ITIMER_PROF, CPU)
    signal.setitimer(signal.ITIMER_REAL, WALL)
    faulthandler.dump_traceback_later(2 * WALL, exit=True)  # stuck where no Python runs
    try:
        return "answer", read()
    except (UserError, OSError) as error:  # what `rmkv` says in a line, with exit code 2
        return "refused", one_line(error)
    except Late:
        return "late", ""
    except BaseException as error:  # also what is raised through Rust
        at = error.__traceback__
        while at.tb_next:
            at = at.tb_next
        place = f"{at.tb_frame.f_code.co_filename}:{at.tb_lineno}"
        return "traceback", f"{type(error).__name__}: {str(error)[:300]} at {place}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def restore(path, data):
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    path.write_bytes(data)


def main():
    folder, seed, first, count, *only = sys.argv[1:]
    faulthandler.enable()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, late)
    signal.signal(signal.SIGPROF, late)
    shutil.rmtree(folder, ignore_errors=True)
    kinds = Kinds(Path(folder))
    answers = {kind: attempt(read) for kind, read in kinds.read.items()}
    assert all(outcome == "answer" for outcome, _ in answers.values()), answers
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for kind in only or kinds.read:
        path = Path(folder) / kind
        data = path.read_bytes()
        for number in range(int(first), int(first) + int(count)):
            done, free = damage(path, draw(seed, kind, number))
            print(json.dumps({"kind": kind, "number": number, "done": done}), flush=True)
            outcome, said = attempt(kinds.read[kind])
            if outcome == "answer":
                same = (outcome, said) == answers[kind]
                free = free or not kind.startswith(kinds.CHECKED)
                outcome, said = "same" if same else "another, rightly" if free else "ANOTHER ANSWER", ""
            elif outcome == "refused" and (not said.strip() or "Traceback" in said or len(said) > 9000):
                outcome = "not one line"
            print(json.dumps({"kind": kind, "number": number, "outcome": outcome, "said": said[:500]}), flush=True)
            restore(path, data)


if __name__ == "__main__":
    main()
