"""Recipes for synthetic data report every error of a file at once, with its place and what is valid."""

import pytest

from rmkv_cli.config import data_recipe_path, dump_toml, list_data_recipes, load_any, load_data_recipe
from rmkv_cli.errors import UserError

GOOD = """
count = 3
prompt = "{topic}"
[writer]
model = "m"
[slots.topic]
values = ["a"]
"""


def errors(tmp_path, text, *overrides):
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_data_recipe(path, overrides)
    return str(caught.value).replace(f"{path}: ", "").splitlines()


@pytest.mark.parametrize("name", ["problems", "questions", "stories"])
def test_shipped_recipes_need_only_a_writer(name, tmp_path):
    assert name in list_data_recipes()
    recipe = load_data_recipe(data_recipe_path(name), ["writer.model=runs/x"])
    (tmp_path / "r.toml").write_text(dump_toml(recipe))
    assert load_any(tmp_path / "r.toml") == recipe
    assert errors(tmp_path, data_recipe_path(name).read_text()) == ["writer: is missing"]


def test_an_unknown_recipe_suggests_the_nearest_one():
    with pytest.raises(UserError, match=r"recipe 'storys': no such recipe; did you mean 'stories'\?"):
        data_recipe_path("storys")


def test_every_error_of_a_recipe_is_reported_at_once(tmp_path):
    text = GOOD.replace("count", "cuont").replace("values", "vales") + 'url = "x"\n[sampling]\ntop_p = 2\n'
    found = errors(tmp_path, text)
    assert "count: is missing" in found
    assert "cuont: unknown key; did you mean 'count'?" in found
    assert "slots.topic.vales: unknown key; did you mean 'values'?" in found
    assert any(line.startswith("sampling.top_p: should be less than or equal to 1") for line in found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD + 'file = "f"', "slots.topic.files: a slot has exactly one of `values`, `file` and `files`"),
        (GOOD + "[slots.none]", "slots.none.files: a slot has exactly one of `values`, `file` and `files`"),
        (
            GOOD.replace("{topic}", "{tpoic}"),
            "prompt: 'prompt' has the unknown field {tpoic}; did you mean 'topic'?",
        ),
        (GOOD.replace("{topic}", "{x}"), "prompt: 'prompt' has the unknown field {x} (there are: topic)"),
        (GOOD + '[row]\na = "{respons}"', "row: 'a' has the unknown field {respons}; did you mean 'response'?"),
        (GOOD + '[row]\na = "{topic_following}"', "row: 'a' has the unknown field {topic_following}"),
        (GOOD + '[row]\nseed = "x"', "row: 'seed' is a column of every row; choose another name"),
        (GOOD + '[filters]\nquoted = { a = "topic" }', "row: filters.quoted: 'a' is not among filters.json_keys"),
        (GOOD + '[filters]\njson_keys = ["a"]\nquoted = { a = "tpic" }', "no slot 'tpic'; did you mean 'topic'?"),
        (GOOD.replace('"m"', '"m"\nurl = "localhost:8000"'), "writer.url: string should match pattern"),
        (GOOD.replace('"m"', '"m"\nkey_env = "K"'), "writer.key_env: a model folder needs no key"),
    ],
)
def test_what_does_not_fit_is_reported(tmp_path, text, words):
    assert words in "\n".join(errors(tmp_path, text))


def test_overrides_reach_slots(tmp_path):
    (tmp_path / "r.toml").write_text(GOOD)
    recipe = load_data_recipe(tmp_path / "r.toml", ['slots.topic.values=["b", "c"]', "count=2k"])
    assert (recipe.slots["topic"].values, recipe.count) == (["b", "c"], 2000)
    assert errors(tmp_path, GOOD, "slots.topic.valeus=[]") == [
        "--set slots.topic.valeus: unknown key; did you mean 'slots.topic.values'?"
    ]
