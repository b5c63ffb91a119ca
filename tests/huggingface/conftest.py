import pytest
import torch
from small_run import save_small_model

from rmkv_cli.config import MemoryConfig

MODELS = {
    "usual": {"vocab_size": 300},
    "other": {
        "memory": MemoryConfig(slots=3, cell="lstm", store_features=2),
        "position": "learned",
        "max_position_embeddings": 200,
        "tie_word_embeddings": False,
        "intermediate_size": 0,
        "experts": 3,
        "expert_size": 8,
    },
}


def save_varied_model(folder, **shape):
    """Write a model that writes now this and now that, with its tokenizer; return both."""
    model, tokenizer = save_small_model(folder, **shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        model.norm.bias.zero_()
    model.save_pretrained(folder)
    return model, tokenizer


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with a model folder of each name, and the models and tokenizers by name."""
    place = tmp_path_factory.mktemp("models")
    return place, {name: save_varied_model(place / name, **shape) for name, shape in MODELS.items()}
