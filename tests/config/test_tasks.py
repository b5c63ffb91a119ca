"""Tasks in a mix: valid configs, and the errors of invalid ones."""

import pytest

from rmkv_cli.config import MixConfig, NeedleSource, RecallSource, dump_toml, load_mix
from rmkv_cli.errors import UserError


def errors(tmp_path, text):
    (tmp_path / "mix.toml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_mix(tmp_path / "mix.toml")
    return [line.removeprefix(f"{tmp_path / 'mix.toml'}: ") for line in str(caught.value).splitlines()]


@pytest.mark.parametrize("kind", ["recall", "copy", "reverse", "needle", "facts"])
def test_a_task_needs_only_its_kind_and_survives_a_round_trip(tmp_path, kind):
    (tmp_path / "mix.toml").write_text(f'tokens = 5\n[[sources]]\nkind = "{kind}"\n')
    mix = load_mix(tmp_path / "mix.toml")
    (task,) = mix.sources
    assert (task.kind, task.name, task.weight, task.text) == (kind, kind, 1, None)
    assert type(task)() == task
    (tmp_path / "mix.toml").write_text(dump_toml(mix))
    assert load_mix(tmp_path / "mix.toml") == mix == MixConfig.model_validate_json(mix.model_dump_json())


def test_errors_name_the_place_within_the_task(tmp_path):
    lines = errors(
        tmp_path,
        """
        tokens = 5
        [[sources]]
        kind = "recall"
        pairs = [4, 0]
        segment = [1]
        [[sources]]
        kind = "needle"
        depth = [1.5]
        value = "words"
        """,
    )
    assert "sources[0].pairs[1]: should be greater than or equal to 1, got 0" in lines
    assert "sources[0].segment: unknown key; did you mean 'segments'?" in lines
    assert "sources[1].depth[0]: should be less than or equal to 1, got 1.5" in lines
    assert any(line.startswith("sources[1].value: should be 'number', 'uuid' or 'word'") for line in lines)
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ("kind = 'recall'\npairs = [2, 65]", "pairs = 65 needs at least as many different keys, but keys = 64"),
        ("kind = 'facts'\nfacts = [1, 3]\nsentences = 2", "facts = 3 is more than the story's sentences = 2"),
        ("kind = 'copy'\nlength = []", "should have at least 1 item"),
        (
            "kind = 'copy'\ntext = 'bok'",
            "'copy': text = 'bok' is not a source of text in this mix; did you mean 'b",
        ),
        ("kind = 'copy'\ntext = 'copy'", "'copy' is not a source of text in this mix (there are: book)"),
    ],
)
def test_rules(tmp_path, keys, says):
    book = "tokens = 5\n[[sources]]\nkind = 'files'\nname = 'book'\nweight = 1\nfiles = ['book.txt']\n"
    (line,) = errors(tmp_path, f"{book}[[sources]]\n{keys}")
    assert says in line


def test_a_mix_with_a_task_needs_a_length(tmp_path):
    (line,) = errors(tmp_path, "[[sources]]\nkind = 'facts'")
    assert line == "sources: a source of kind 'facts' is endless, so the mix needs `tokens`"


def test_two_tasks_of_a_kind_need_names(tmp_path):
    (line,) = errors(tmp_path, "tokens = 5\n" + 2 * "[[sources]]\nkind = 'copy'\n")
    assert "sources share a name: copy; each needs its own" in line


def test_tasks_can_be_created_without_a_mix():
    assert RecallSource(pairs=[3]).pairs == [3]
    assert NeedleSource().depth == [0, 0.25, 0.5, 0.75, 1]
