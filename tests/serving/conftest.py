import pytest
from small_run import save_small_model
from small_server import running

from rmkv_cli.model import RMKV
from rmkv_cli.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model's folder; its float64 makes texts the same, to the last draw, whatever is written beside them."""
    folder = tmp_path_factory.mktemp("models") / "small"
    folder.mkdir()
    save_small_model(folder)[0].double().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def loaded(folder):
    return RMKV.from_pretrained(folder).eval(), Tokenizer.load(folder)


@pytest.fixture(scope="session")
def server(loaded):
    with running(*loaded) as server:
        yield server


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client
