"""The shipped mix, read from a hub on loopback, gives the same rows after kills and faults; errors are one line."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked import Forker
from hub import Hub
from hub_data import FINEWEB, NEMOTRON, REASONING, write_real_sets

from rmkv_cli.tokenizer import train_tokenizer

ENDLESS = 1_000_000  # rows: it reads until it is killed
SCRIPT = Path(__file__).parents[1] / "stream_rows.py"


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder of the three data sets."""
    root = tmp_path_factory.mktemp("hub")
    write_real_sets(root)
    return root


@pytest.fixture
def hub(sets):
    with Hub(sets) as hub:
        yield hub


@pytest.fixture
def environment(hub, tmp_path):
    return os.environ | hub.environment(tmp_path / "home")


@pytest.fixture
def tokenizer(tmp_path):
    train_tokenizer(iter(["the river runs under the old stone and wind says that it was of light"]), 300).save(
        tmp_path / "t.json"
    )
    return tmp_path / "t.json"


def rows(environment, tokenizer, file, wanted):
    command = [sys.executable, SCRIPT, "pretrain", tokenizer, str(wanted), file]
    return subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, messages = process.communicate()
    assert process.returncode == 0, messages
    return messages


def noted(file):
    return len(pickle.loads(file.read_bytes())[0]) if file.exists() else 0


@pytest.mark.slow
def test_the_rows_are_the_same_after_twenty_kills_and_faults(hub, environment, tokenizer, tmp_path):
    draw = random.Random(0)
    faults = [{"status": 503}, {"status": 429, "retry_after": 0}, {"cut": 1000}, {"slow": 0.3}]
    with Forker("stream_rows", "datasets", environment=environment) as forker:
        for kill in range(20):
            if kill % 4 == 0:
                hub.fail(r"(parquet|jsonl)$", 2, **faults[kill // 4 % len(faults)])
            asked = "pretrain", tokenizer, ENDLESS, tmp_path / "killed"
            process = forker.start("stream_rows:main", *asked, err=tmp_path / "said")
            further = noted(tmp_path / "killed") + draw.randint(1, 9)
            while noted(tmp_path / "killed") < further:
                assert process.poll() is None, (tmp_path / "said").read_text()
                time.sleep(draw.uniform(0, 0.02))
            process.kill()
            process.wait()
    wanted = noted(tmp_path / "killed") + 20
    finish(rows(environment, tokenizer, tmp_path / "killed", wanted))
    finish(rows(environment, tokenizer, tmp_path / "whole", wanted))
    one, other = (pickle.loads((tmp_path / name).read_bytes())[0] for name in ("whole", "killed"))
    assert len(one) == wanted
    assert one == other


@pytest.mark.slow
def test_a_hub_that_dies_and_comes_back_costs_nothing_but_time(hub, environment, tokenizer, tmp_path):
    def opened():  # the last request before those for files
        return sum("dataset_infos" in path for _, path, *_ in hub.requests())

    finish(rows(environment, tokenizer, tmp_path / "whole", 60))
    all_opened = 2 * opened()
    hub.fail("parquet$", 1, slow=60)
    process = rows(environment, tokenizer, tmp_path / "broken", 60)
    while opened() < all_opened:
        time.sleep(0.1)
    time.sleep(1)
    hub.kill()
    time.sleep(1)
    hub.start()
    assert "Retrying in" in finish(process)  # the library's line
    one, other = (pickle.loads((tmp_path / name).read_bytes())[0] for name in ("whole", "broken"))
    assert one == other


def write_mix(folder, dataset, **keys):
    lines = [f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value}" for key, value in keys.items()]
    (folder / "mix.toml").write_text(
        f'[[sources]]\nkind = "hub"\nname = "it"\nweight = 1\ndataset = "{dataset}"\n' + "\n".join(lines)
    )


def inspect(environment, folder, dataset, first=""):
    """`rmkv data inspect` of a mix of that data set, in a process that runs `first` before it."""
    write_mix(folder, dataset)
    code = f"{first}\nfrom rmkv_cli.cli.main import main\nmain()"
    command = [sys.executable, "-c", code, "data", "inspect", "mix.toml"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def one_hub(sets, tmp_path_factory):
    """A hub for several tests, the cache for what is read from it, and a forker of processes that read from it."""
    home = tmp_path_factory.mktemp("home")
    with (
        Hub(sets) as hub,
        Forker("rmkv_cli.cli.main", "datasets", environment=os.environ | hub.environment(home)) as forker,
    ):
        yield hub, home, forker


@pytest.fixture
def mended(one_hub, tmp_path, monkeypatch):
    """The hub, without faults; and a function that inspects a mix of a data set, with an empty cache."""
    hub, home, forker = one_hub
    hub.mend()
    monkeypatch.chdir(tmp_path)

    def inspect_in_a_fork(dataset, **keys):
        shutil.rmtree(home, ignore_errors=True)
        write_mix(tmp_path, dataset, **keys)
        return forker.run("data", "inspect", "mix.toml")

    return hub, inspect_in_a_fork


NO_WAITS = "import time; time.sleep = lambda seconds: None"
SFT = {"config": "SFT", "format": "messages", "messages_column": "input", "answer_column": "output"}


@pytest.mark.parametrize(
    ("dataset", "keys", "fault", "line"),
    [
        (FINEWEB, {}, {"gated": True}, f"data set {FINEWEB} is gated: accept its terms at http"),
        (FINEWEB, {}, {"gated": True, "pattern": "parquet$"}, f"data set {FINEWEB} is gated: accept its terms at http"),
        (FINEWEB, {}, {"status": 403, "pattern": "parquet$"}, f"data set {FINEWEB}: access is refused; accept its"),
        ("HuggingFaceFW/finewebb", {}, None, "there is no data set HuggingFaceFW/finewebb at http"),
        (
            FINEWEB,
            {"config": "sample-10TB"},
            None,
            "BuilderConfig 'sample-10TB' not found. Available: ['default', 'sample",
        ),
        (FINEWEB, {"revision": "v9"}, None, f"data set {FINEWEB} has no revision 'v9'"),
        (NEMOTRON, SFT | {"split": "maths"}, None, "config SFT: no split 'maths'; did you mean 'math'?"),
        (REASONING, {}, None, "has no column 'text' (it has: prompt, response)"),
        (FINEWEB, {"text_column": "token_count"}, None, "column 'token_count' is not a string but a number"),
        (FINEWEB, {}, {"status": 404}, f"data set {FINEWEB}: "),
    ],
)
def test_a_permanent_failure_is_one_line(mended, dataset, keys, fault, line):
    hub, inspect = mended
    if fault:
        hub.fail(**{"pattern": "README|api", "times": 99} | fault)
    done = inspect(dataset, **keys)
    error = done.stderr.splitlines()[-1]
    assert (done.returncode, done.stdout) == (2, "")
    assert error.startswith("error: ")
    assert "source 'it'" in error
    assert line in error
    assert "Traceback" not in done.stderr
    if "gated" in line:
        assert error.endswith("then log in with `hf auth login`, or set HF_TOKEN")


@pytest.mark.slow
def test_files_of_an_unknown_kind_and_a_folder_of_the_same_name_are_refused(mended, sets, tmp_path):
    _, inspect = mended
    repo = sets / "some/records"
    repo.mkdir(parents=True)
    (repo / "README.md").write_text('---\nconfigs:\n- config_name: default\n  data_files: "*.json"\n---\n')
    (repo / "all.json").write_text('[{"text": "one"}]')
    error = inspect("some/records").stderr.splitlines()[-1]
    assert "all.json: is not a supported kind of file; supported are .arrow, .csv" in error
    (tmp_path / FINEWEB).mkdir(parents=True)
    (tmp_path / FINEWEB / "a.parquet").touch()
    error = inspect(FINEWEB).stderr.splitlines()[-1]
    assert f"{tmp_path / FINEWEB} hides the data set of that name" in error


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_retried(hub, environment, tmp_path):
    hub.fail("/api/datasets", 1, slow=60)
    done = inspect(environment, tmp_path, FINEWEB, first="from rmkv_cli.data import hub; hub.TIMEOUT = 1.0")
    assert done.returncode == 0
    assert "timed out; trying again in 1 s" in done.stderr


IMPATIENT = f"""
import sys
{NO_WAITS}
from pathlib import Path
from rmkv_cli.config import MixConfig
from rmkv_cli.data.sources import open_source, read_source
source = MixConfig(sources=[dict(kind="hub", name="it", weight=1, dataset=sys.argv[1])]).sources[0]
for _, item in read_source(source, open_source(source, Path()), [0]):
    print(item.pieces[0], flush=True)
    sys.stdin.readline()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "fault"), [("parquet", {"status": 503}), ("jsonl", {"cut": 1000})])
def test_a_file_is_reopened_at_its_last_block_when_the_library_gives_up(hub, environment, sets, kind, fault):
    """The faults outlast the library's six tries in the middle of a file that does not fit its read-ahead."""
    repo = sets / "large" / f"{kind}-{next(iter(fault))}"
    texts = [f"{i} " + random.Random(i).randbytes(30_000).hex() for i in range(400)]
    repo.mkdir(parents=True)
    (repo / "README.md").write_text(f'---\nconfigs:\n- config_name: default\n  data_files: "*.{kind}"\n---\n')
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), repo / "a.parquet", row_group_size=40)
    else:
        (repo / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = [sys.executable, "-c", IMPATIENT, f"large/{repo.name}"]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as reader:
        found = []
        while line := reader.stdout.readline():
            found.append(line.rstrip("\n"))
            if len(found) == 10:
                hub.fail(f"{kind}$", 8, **fault)
            print(file=reader.stdin, flush=True)
        assert reader.wait() == 0, reader.stderr.read()
        assert "trying again in 5 s" in reader.stderr.read()
    assert sorted(found) == sorted(texts)


@pytest.mark.slow
def test_a_renamed_data_set_is_found_and_an_unreachable_hub_is_reported(hub, environment, tmp_path):
    hub.fail("old/name", 99, moved=FINEWEB)
    done = inspect(environment, tmp_path, "old/name")
    assert done.returncode == 0, done.stderr
    hub.kill()
    done = inspect(environment, tmp_path, FINEWEB, first=NO_WAITS)
    assert done.returncode == 2
    assert done.stderr.count("trying again in") == 3
    assert f"the hub at {hub.endpoint} cannot be read" in done.stderr.splitlines()[-1]
