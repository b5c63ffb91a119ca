"""Configs are typed by the schema; every error of a file is reported at once, with its place and what is valid."""

import pytest

from rmkv_cli.cli.options import at_least
from rmkv_cli.config import (
    Config,
    MixConfig,
    dump_toml,
    list_presets,
    load_config,
    load_mix,
    preset_path,
    whole_number,
)
from rmkv_cli.errors import UserError


def errors(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    return str(caught.value).splitlines()


def write(tmp_path, text):
    path = tmp_path / "my.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["demo", "tiny", "125m", "600m", "600m-published", "instruct", "convert", "reinforce"])
def test_presets_are_valid_and_survive_a_round_trip(name, tmp_path):
    config = load_config(preset_path(name))
    assert load_config(write(tmp_path, dump_toml(config))) == config
    assert list_presets()[name]


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Config().model.hidden_size = 5


def test_overrides_are_typed_by_the_schema_and_the_last_one_wins():
    config = load_config(
        preset_path("tiny"),
        [
            "model.memory.slots=64",
            "model.tie_word_embeddings=false",
            "train.learning_rate=1e-4",
            "train.seed=1",
            "train.seed=2",
        ],
    )
    assert (config.model.memory.slots, config.model.tie_word_embeddings) == (64, False)
    assert (config.train.learning_rate, config.train.seed) == (1e-4, 2)


NUMBERS = {"64": 64, "5k": 5000, "1M": 10**6, "1.5G": 15 * 10**8, "2B": 2 * 10**9, "1e6": 10**6, "2_000_000": 2 * 10**6}


@pytest.mark.parametrize(("written", "number"), NUMBERS.items(), ids=NUMBERS)
def test_whole_numbers_are_parsed_the_same_everywhere(tmp_path, written, number):
    assert load_config(preset_path("tiny"), [f"train.tokens={written}"]).train.tokens == number
    assert load_config(write(tmp_path, f'[train]\ntokens = "{written}"')).train.tokens == number
    noise = '[[sources]]\nkind = "noise"\nname = "n"\nweight = 1\nvocab = 9'
    assert load_mix(write(tmp_path, f'tokens = "{written}"\n{noise}')).tokens == number
    assert at_least(1)(written) == number


@pytest.mark.parametrize("written", ["many", "", "k", "1.5", "0.0001k", "nan", "inf", "1e999999999", "0x10", "1e-3"])
def test_the_error_for_an_invalid_whole_number_shows_valid_ones(written):
    with pytest.raises(ValueError, match=r"should be a whole number such as 64, 5k, 5M, 1\.5G or 1e6, got '"):
        whole_number(written)


def test_all_errors_of_a_file_come_at_once_with_their_place(tmp_path):
    path = write(
        tmp_path,
        """
        [model]
        hiden_size = 64
        vocab_size = "many"
        lookback = -1
        [model.memory]
        cell = "gur"
        [train]
        segments_min = 9
        segments_max = 3
        batch_size = 10
        micro_batch_size = 3
        """,
    )
    lines = errors(load_config, path)
    assert f"{path}: model.hiden_size: unknown key; did you mean 'hidden_size'?" in lines
    assert any(
        line.startswith(f"{path}: model.vocab_size: should be a whole number") and "'many'" in line for line in lines
    )
    assert any(line.startswith(f"{path}: model.lookback: ") and "greater than or equal to 0" in line for line in lines)
    assert any("model.memory.cell" in line and "'gru', 'lstm' or 'minimal'" in line for line in lines)
    assert f"{path}: train.segments_max: segments_min = 9 is above segments_max = 3" in lines
    assert f"{path}: train.micro_batch_size: micro_batch_size = 3 does not divide batch_size = 10" in lines
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.memory.slts=3", "--set model.memory.slts: unknown key; did you mean 'model.memory.slots'?"),
        ("tokens=5", "--set tokens: unknown key; did you mean 'train.tokens'?"),
        ("token=5", "--set token: unknown key; did you mean 'train.tokens'?"),
        ("memory.slots=5", "--set memory.slots: unknown key; did you mean 'model.memory.slots'?"),
        ("memory.slot=5", "--set memory.slot: unknown key; did you mean 'model.memory.slots'?"),
        ("model.slots=5", "--set model.slots: unknown key; did you mean 'model.memory.slots'?"),
        ("train.model.seed=5", "--set train.model.seed: unknown key; did you mean 'train.seed'?"),
        ("zzzz=5", "--set zzzz: unknown key; known keys are model, train"),
        (
            "model.memory.slots=many",
            "--set model.memory.slots: should be a whole number such as 64, 5k, 5M, 1.5G or 1e6, got 'many'",
        ),
        ("model.memory.slots=1.5", "should be a whole number such as 64, 5k, 5M, 1.5G or 1e6, got '1.5'"),
        ("model.memory.slots=-1k", "--set model.memory.slots: should be greater than or equal to 0"),
        ("model.memory.slots", "should be KEY=VALUE"),
        ("model.vocab_size.x=3", "'vocab_size' is a value, not a section"),
        ("train.learning_rate=nan", "should be a finite number"),
    ],
)
def test_a_wrong_override_is_named(override, says):
    (line,) = errors(load_config, preset_path("tiny"), [override])
    assert says in line


def test_an_override_of_tokens_replaces_epochs_and_vice_versa(tmp_path):
    def length(given, *overrides):
        train = load_config(write(tmp_path, f"[train]\n{given}"), overrides).train
        return train.epochs, train.tokens if "tokens" in train.model_fields_set else None

    assert length("tokens = 5", "train.epochs=2.5") == (2.5, None)
    assert length("epochs = 2\ntokens = 5", "train.tokens=7") == (None, 7)
    assert length("epochs = 2\ntokens = 5", "train.seed=7") == (2, 5)
    (line,) = errors(length, "", "train.tokens=7", "train.epochs=2")
    assert line == "--set train.tokens and train.epochs: both set the length of training; give only one"


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ("hidden_size = 64\nnum_attention_heads = 5", "num_attention_heads = 5 does not divide hidden_size = 64"),
        ("segment_length = 8\nlookback = 9", "lookback = 9 is longer than segment_length = 8; allowed are 0 to 8"),
        ("lookback = 0\nhidden_size = 6\nnum_attention_heads = 2", "and hidden_size / num_attention_heads = 3"),
        ("num_attention_heads = 9\nnum_key_value_heads = 2", "= 2 does not divide num_attention_heads = 9"),
        ("head_size = 3\nnum_attention_heads = 5", "rotary positions need an even head width, got head_size = 3"),
        ("rope.low_freq_factor = 4", "low_freq_factor = 4.0 should be below high_freq_factor = 4.0"),
        ("hidden_size = 9\nnum_attention_heads = 9\nposition = 'sinusoidal'", "need an even hidden_size, got 9"),
    ],
)
def test_rules_across_keys(tmp_path, keys, says):
    (line,) = errors(load_config, write(tmp_path, f"[model]\n{keys}"))
    assert ": model." in line
    assert line.endswith(says)


def test_a_wrong_value_hides_only_the_rules_that_need_it(tmp_path):
    keys = "hidden_size = 0\nnum_attention_heads = 5\nposition = 'sinusoidal'\nlookback = '9'\nsegment_length = 8"
    wrong, rule = errors(load_config, write(tmp_path, f"[model]\n{keys}"), ["model.lookback=9"])
    assert ": model.hidden_size: should be greater than" in wrong
    assert rule.endswith("--set model.lookback: lookback = 9 is longer than segment_length = 8; allowed are 0 to 8")
    source = "[[sources]]\nkind = 'noise'\nname = 'a'\nweight = 1\nvocab = 9\n"
    wrong, names = errors(load_mix, write(tmp_path, f"tokens = 0\n{source}{source}"))
    assert ": tokens: should be greater than" in wrong
    assert names.endswith("my.toml: sources: sources share a name: a; each needs its own")
    _, rules = errors(load_mix, write(tmp_path, f"seed = -1\n{source}{source}"))
    assert "share a name: a; " in rules
    assert "needs `tokens`" in rules


def test_unknown_presets_and_broken_files(tmp_path):
    assert "did you mean 'tiny'?" in errors(preset_path, "tinny")[0]
    assert "no such file" in errors(load_config, tmp_path / "absent.toml")[0]
    assert "is empty" in errors(load_config, write(tmp_path, ""))[0]
    assert "not valid TOML" in errors(load_config, write(tmp_path, "[model\n"))[0]
    (tmp_path / "my.toml").write_bytes(b"\xff\xfe\x00")
    assert "not valid TOML" in errors(load_config, tmp_path / "my.toml")[0]


def test_errors_in_a_mix_name_the_source(tmp_path):
    path = write(
        tmp_path,
        """
        tokns = 5
        [[sources]]
        kind = "files"
        name = "a"
        weigt = 1
        files = ["x.txt"]
        [[sources]]
        kind = "nois"
        [[sources]]
        name = "b"
        """,
    )
    lines = errors(load_mix, path)
    assert f"{path}: sources[0].weigt: unknown key; did you mean 'weight'?" in lines
    assert f"{path}: sources[0].weight: is missing" in lines
    assert f"{path}: tokns: unknown key; did you mean 'tokens'?" in lines
    kinds = "'files', 'hub', 'noise', 'recall', 'copy', 'reverse', 'needle', or 'facts'"
    assert f"{path}: sources[1]: kind should be {kinds}, got 'nois'; did you mean 'noise'?" in lines
    assert f"{path}: sources[2]: kind is missing; it should be {kinds}" in lines


def test_a_file_full_of_errors_is_reported_in_readable_lines(tmp_path):
    keys = "".join(f'k{i} = "{"x" * 5000}"\n' for i in range(900))
    *lines, last = errors(load_config, write(tmp_path, f"[model]\nhidden_size = '{'9' * 5000}'\n{keys}"))
    assert len(lines) == 50
    assert max(map(len, lines)) <= 1001
    assert "851 more errors" in last


def test_a_mix_may_name_hundreds_of_thousands_of_files(tmp_path):
    """The mix.toml of a streamed run names each of its files."""
    mix = MixConfig(sources=[{"kind": "files", "name": "a", "weight": 1, "files": ["a.txt", "b.txt"]}])
    rest = f"# {'of the same length as more names' * (1 << 20)}\n"
    assert load_mix(write(tmp_path, dump_toml(mix) + rest)) == mix
