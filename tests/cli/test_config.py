"""`rmkv config`, through the real entry point."""

import subprocess
import sys


def test_validate_detects_each_file_s_kind_and_reports_all_errors(tmp_path):
    files = {
        "model.toml": "[model]\nsegment_length = 8\nlookback = 4\n",
        "bad.toml": "[model]\nslots = 3\n[train]\ntokens = 0\n",
        "mix.toml": "sources = [{kind = 'files', name = 'a', weight = 1, files = ['a.txt']}]\n",
        "noise.toml": "[[sources]]\nkind = 'noise'\nname = 'a'\nweight = 1\nvocab = 9\n",
        "broken.toml": "[[sources]\n",
        "quoting.toml": "# no [[sources]] here\n[train]\nseed = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "rmkv_cli", "config", "validate", *files, "absent.toml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.splitlines() == ["model.toml: valid", "mix.toml: valid", "quoting.toml: valid"]
    slots, tokens, noise, broken, absent = done.stderr.removeprefix("error: ").splitlines()
    assert slots.startswith("bad.toml: model.slots: unknown key")
    assert tokens.startswith("bad.toml: train.tokens: should be greater than")
    assert noise.startswith("noise.toml: sources: a source of kind 'noise' is endless")
    assert broken.startswith("broken.toml: not valid TOML: ")
    assert absent == "absent.toml: no such file"
