"""Samples that a model generates during training."""

import torch
from small_documents import make_documents
from small_run import save_small_model

from rmkv_cli.config import MemoryConfig
from rmkv_cli.evaluation import write_sample
from rmkv_cli.evaluation.sample import PROMPT_TOKENS, TEXT_TOKENS
from rmkv_cli.generation import SamplingConfig, generate


def documents_of(tokenizer, *texts):
    return make_documents([tokenizer.encode(text) for text in texts], vocab_size=tokenizer.vocab_size)


def test_the_first_long_document_s_beginning_is_continued_alike_each_time(tmp_path):
    model, tokenizer = save_small_model(tmp_path)
    long = "<eod> `the dog` sat on 1 log and on 2 logs and on 3. " * 3
    documents = documents_of(tokenizer, "the cat", long, "the dog " * 60)
    model.train()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    sample = write_sample(model, documents, tokenizer)
    assert sample["prompt"] == tokenizer.decode(tokenizer.encode(long)[:PROMPT_TOKENS])
    continuation = "".join(generate(model, tokenizer, sample["prompt"], SamplingConfig(seed=0), TEXT_TOKENS))
    assert sample["text"] == continuation != ""
    assert write_sample(model, documents, tokenizer) == sample
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_where_all_documents_are_short_the_first_is_the_prompt(tmp_path):
    model, tokenizer = save_small_model(tmp_path)
    assert write_sample(model, documents_of(tokenizer, "the cat", "sat"), tokenizer)["prompt"] == "the cat"
    assert write_sample(model, documents_of(tokenizer, ""), tokenizer)["prompt"] == ""


def test_a_model_that_cannot_generate_gives_no_sample(tmp_path):
    layers = MemoryConfig(slots=2, carry="layers", store=0)
    for shape in ({"memory": layers}, {"position": "learned", "max_position_embeddings": 50}):
        model, tokenizer = save_small_model(tmp_path / next(iter(shape)), **shape)
        assert write_sample(model, documents_of(tokenizer, "the cat " * 40), tokenizer) is None
