"""Small random transformers of the families that can be imported, for tests."""

import json
from contextlib import contextmanager

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BEFORE = {"Mistral": {"sliding_window": None}, "Qwen3": {"head_dim": 8}}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@contextmanager
def in_float64(monkeypatch):
    """Make transformers compute norms and angles in float64, which it otherwise computes in float32 in all models."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        yield


def make_transformer(family, seed=0, dtype=torch.float64, **options):
    """A small model whose parameters are all random, so that no zero or one hides an error."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**SHAPE | BEFORE.get(family, {}) | options)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.generation_config.do_sample = False
    return model.eval().requires_grad_(False)


def save_tokenizer(folder):
    """Write a byte-level BPE tokenizer with the special tokens of SmolLM2, and a chat template."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, and the dog sat on the log. " * 20], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": specials[1], "eos_token": specials[2]}
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))


def save_transformer(folder, family, max_shard_size="5GB", **options):
    """Write a small model and a tokenizer in transformers' format; return the model."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # so that stderr holds nothing but messages of rmkv
    model = make_transformer(family, **options)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    save_tokenizer(folder)
    return model
