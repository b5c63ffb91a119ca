import time

import pytest
import torch
from no_sync import no_sync
from small_run import save_small_model
from small_server import running

from rmkv_cli.config import load_config, preset_path
from rmkv_cli.generation import Decoder, SamplingConfig
from rmkv_cli.generation.sampler import Sampler
from rmkv_cli.model import RMKV


def tiny(device):
    torch.manual_seed(0)
    return RMKV(load_config(preset_path("tiny")).model).eval().to(device)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # PyTorch's compiler itself calls it
def test_the_compiled_step_decodes_as_the_plain_one(device):
    model = tiny(device)
    tokens = torch.randint(model.config.vocab_size, (model.config.segment_length + 6, 4), device=device)
    found = []
    for compiled in (False, True):
        decoder = Decoder(model, 4, compiled=compiled)
        for _ in range(4):
            decoder.add(model.initial_state(1))
        found.append(torch.stack([decoder.step(each) for each in tokens]).cpu())
        began = time.perf_counter()
        for each in tokens[:32]:
            logits = decoder.step(each)
        logits.cpu()  # waits for the device
        rate = 32 * 4 / (time.perf_counter() - began)
        print(f"\n{'compiled' if compiled else 'plain'}: {rate:,.0f} tokens/s, 4 texts")
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_a_decoding_step_and_its_draw_never_wait_for_the_device(device):
    model = tiny(device)
    decoder, token = Decoder(model, 2), torch.zeros(2, dtype=torch.int64, device=device)
    for _ in range(2):
        decoder.add(model.initial_state(1))
    logits = decoder.step(token)
    sampler = Sampler(2, model.config.vocab_size, logits[:1])
    for lane, config in enumerate((SamplingConfig(top_k=9, repetition_penalty=1.1), SamplingConfig(temperature=0))):
        sampler.put(lane, config, torch.zeros_like(logits[:1], dtype=torch.bool))
    sampler.draw(logits)  # libraries set themselves up
    with no_sync(device):
        sampler.draw(decoder.step(sampler.tokens))


def test_the_server_answers_a_request(tmp_path, device):
    model, tokenizer = save_small_model(tmp_path / "model")
    with running(model.to(device), tokenizer) as server:
        body = {"model": "small", "prompt": "the cat", "max_tokens": 8, "temperature": 0}
        done = server.ask("POST", "/v1/completions", json=body)
        assert done.status_code == 200
        assert done.json()["usage"]["completion_tokens"] == 8
