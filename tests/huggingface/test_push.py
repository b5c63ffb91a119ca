import re

import pytest
import torch
from hub import Hub
from huggingface_hub import HfApi
from small_run import error_of, rmkv
from transformers_alone import alone

from rmkv_cli.huggingface import export_folder


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "usual"
    export_folder(models[0] / "usual", folder)
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that this process takes for the real one, with a token that may write."""
    with Hub(tmp_path / "hub") as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "writer")
        yield hub


@pytest.mark.slow
def test_transformers_loads_what_was_pushed_from_the_hub(models, exported, hub, tmp_path, monkeypatch):
    here = hub.environment(tmp_path / "home")
    for name, value in here.items():
        monkeypatch.setenv(name, value)
    done = rmkv("push", exported, "someone/small", "--private")  # a process of its own: httpx2 warns of large files
    assert done.stdout.startswith(f"{hub.endpoint}/someone/small/commit/"), done.stderr
    card = (tmp_path / "hub" / "someone" / "small" / "README.md").read_text()
    assert re.findall('\n# .*|from_pretrained\\(".*?"', card)[:3] == [
        "\n# someone/small",
        *['from_pretrained("someone/small"'] * 2,
    ]
    sent = {file.name: file.read_bytes() for file in (tmp_path / "hub" / "someone" / "small").iterdir()}
    named = {"README.md": card.replace("someone/small", "usual").encode()}
    assert sent | named == {file.name: file.read_bytes() for file in exported.iterdir()}
    assert HfApi().model_info("someone/small").private
    ids = torch.arange(7, 57).view(2, 25)
    found = alone(tmp_path, ["someone/small"], {"ids": ids}, **here)
    with torch.no_grad():
        logits = models[1]["usual"][0](ids)[0]
    assert torch.allclose(found["someone/small"]["logits"], logits, atol=1e-5)


def test_a_refusal_is_one_line_that_says_what_to_do(models, exported, hub, tmp_path, monkeypatch, capsys):
    def error(folder=exported, repo="someone/small"):
        return error_of(monkeypatch, capsys, "push", folder, repo)

    assert "use OWNER/NAME" in error(repo="a/b/c")
    assert "usual: is a model folder of rmkv; `rmkv export hf` makes" in error(folder=models[0] / "usual")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert "contains another kind of model (LlamaForCausalLM)" in error(folder=tmp_path / "other")
    (tmp_path / "bad").mkdir()
    for file in exported.iterdir():
        (tmp_path / "bad" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "bad" / "README.md").write_text("# A card without metadata")
    assert "README.md: Invalid metadata in README.md. - no metadata" in error(folder=tmp_path / "bad")
    HfApi().create_repo("someone/public")
    assert "already exists and is public" in error_of(
        monkeypatch, capsys, "push", exported, "someone/public", "--private"
    )
    assert not list((tmp_path / "hub" / "someone" / "public").iterdir())
    monkeypatch.setenv("HF_TOKEN", "reader")
    assert "the token has no write access to someone/small" in error()
    monkeypatch.setenv("HF_TOKEN", "nobody")
    assert "rejects the token; log in again with `hf auth login`" in error()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert "no access token for http://127.0.0.1" in error()
    assert "log in with `hf auth login`, or set HF_TOKEN" in error()


def test_a_hub_that_cannot_be_reached_is_an_error(exported, hub, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in error_of(monkeypatch, capsys, "push", exported, "someone/small")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in error_of(monkeypatch, capsys, "push", exported, "someone/small")
