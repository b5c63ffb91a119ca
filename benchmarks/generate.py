"""Writing side by side in one run: after long and short contexts, beside Llama with its cache, by bandwidth.

python benchmarks/generate.py
python benchmarks/generate.py context llama

Each pair is timed in turns and reported as the ratio of medians; memory is the peak of a separate process. It needs
`pip install -c constraints.txt -e .[bench]`.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from peers import llama, same_size, size
from speed import compare
from train import SHAPE, config_of

from rmkv_cli.config import load_config, preset_path
from rmkv_cli.generation import Decoder
from rmkv_cli.generation.bandwidth import bytes_per_token, memory_bandwidth
from rmkv_cli.model import RMKV, State

CONTEXTS = (1024, 8192, 65536, 524288)
PARTS = ("memory", "context", "llama", "window", "prefill", "bandwidth")  # a child's peak is its parent's at least


def rmkv_model() -> RMKV:
    """Return the model of benchmarks/train.py."""
    return RMKV(config_of(None).model)


@torch.inference_mode()
def after(model: RMKV, context: int) -> State:
    """Return the state after so many random tokens, read a segment at a time."""
    torch.manual_seed(context)
    state = model.initial_state(1)
    for _ in range(context // model.config.segment_length):
        _, state = model.hidden(torch.randint(model.config.vocab_size, (1, model.config.segment_length)), state)
    return state


def writing(model: RMKV, state: State, tokens: int) -> Callable[[], object]:
    """Return a call that writes so many tokens after the state, greedily; the next call goes on."""
    decoder = Decoder(model)
    decoder.add(state)
    token = torch.zeros(1, dtype=torch.int64)

    def call() -> None:
        nonlocal token
        for _ in range(tokens):
            token = decoder.step(token).argmax(-1)

    return call


@torch.inference_mode()
def llama_writing(model: torch.nn.Module, context: int, tokens: int, *, static: bool) -> Callable[[], object]:
    """Return a call that has Llama write so many tokens after a context, whose keys and values are random numbers; the
    next call goes on. Its cache grows, as is transformers' default, or is `static`, which spares it the copies."""
    from transformers import DynamicCache, StaticCache

    room = context + 20 * tokens
    cache = StaticCache(config=model.config, max_cache_len=room) if static else DynamicCache(config=model.config)
    heads = SHAPE["num_attention_heads"]
    for layer in range(SHAPE["num_hidden_layers"]):
        cache.update(*torch.randn(2, 1, heads, context, SHAPE["hidden_size"] // heads), layer)
    token = torch.zeros(1, 1, dtype=torch.int64)

    @torch.inference_mode()
    def call() -> None:
        nonlocal token
        for _ in range(tokens):
            token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    return call


def peak_memory(context: int) -> int:
    """Return the peak of this process's memory in bytes, having read a context and written 256 tokens."""
    model = rmkv_model().eval()
    writing(model, after(model, context), 256)()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def by_context() -> None:
    """Writing after contexts of all lengths."""
    model = rmkv_model().eval()
    S = model.config.segment_length
    works = {f"after {context:,} tokens": writing(model, after(model, context), S) for context in CONTEXTS}
    compare(f"Writing a segment of {S} tokens, {size(model):,} parameters", S, works)


def by_context_memory() -> None:
    """The peak of memory after contexts of all lengths."""
    print("Memory at its peak, read and then 256 tokens written")
    first = 0
    for context in CONTEXTS:
        command = [sys.executable, __file__, "--peak", str(context)]
        peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        first = first or peak
        print(f"  {context:>9,} tokens {peak / 1e6:>9,.1f} MB   {peak / first:.3f}x", flush=True)


def beside_llama() -> None:
    """RMKV and Llama of equal parameters after 1,024 and 65,536 tokens."""
    ours, config = rmkv_model().eval(), config_of(None)
    theirs = llama(config, same_size(lambda inner: llama(config, inner), size(ours))).eval()
    print(f"RMKV {size(ours):,} parameters, Llama {size(theirs):,}")
    for context, tokens in ((1024, 64), (65536, 8)):
        works = {"RMKV": writing(ours, after(ours, context), tokens)}
        works["Llama, cache that grows"] = llama_writing(theirs, context, tokens, static=False)
        works["Llama, static cache"] = llama_writing(theirs, context, tokens, static=True)
        compare(f"Writing after {context:,} tokens", tokens, works)


def beside_window() -> None:
    """Going on from the state, and the published way: reading the window again for each token."""
    model = rmkv_model().eval()
    text = torch.randint(model.config.vocab_size, (1, 1024))

    @torch.inference_mode()
    def again() -> None:
        for _ in range(4):
            model.head(model.hidden(text)[0][:, -1])

    works = {
        "reading the window of 1,024 again each time": again,
        "from the state": writing(model, after(model, 1024), 4),
    }
    compare("Writing", 4, works)


def reading() -> None:
    """Reading long and short prompts, a segment at a time."""
    model = rmkv_model().eval()
    works = {
        f"{length:,} tokens": lambda n=length: [after(model, n) for _ in range(65536 // n)] for length in (4096, 65536)
    }
    compare("Reading a prompt", 65536, works, rounds=3)


@torch.inference_mode()
def products() -> float:
    """Return the bytes of weights a second that PyTorch's products with one vector read, at best."""
    weights = [torch.randn(2304, 768) for _ in range(60)]  # 425 MB
    vector, best = torch.randn(1, 1, 768), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for weight in weights:
            torch.nn.functional.linear(vector, weight)
        best = min(best, time.perf_counter() - start)
    return sum(weight.nbytes for weight in weights) / best


def bandwidth() -> None:
    """What share of the memory's bandwidth one text takes, with the preset 125m."""
    model = RMKV(load_config(preset_path("125m")).model).eval()
    call = writing(model, model.initial_state(1), 16)
    call()
    shares = []
    for _ in range(5):  # bandwidth and writing in turns
        best = memory_bandwidth("cpu")
        start = time.perf_counter()
        call()
        rate = 16 / (time.perf_counter() - start)
        shares.append((rate * bytes_per_token(model) / best, rate, best))
    share, rate, best = sorted(shares)[len(shares) // 2]
    alone = products()
    print(f"Preset 125m, {size(model):,} parameters, {bytes_per_token(model) / 1e6:,.0f} MB a token")
    print(f"  {rate:.1f} tokens/s of {best / 1e9:.1f} GB/s: {share:.0%} of the bandwidth")
    taken = rate * bytes_per_token(model) / alone
    print(f"  products with one vector alone: {alone / 1e9:.1f} GB/s, of which writing takes {taken:.0%}")


def main() -> None:
    """Run the parts that are asked for."""
    works = dict(
        zip(PARTS, (by_context_memory, by_context, beside_llama, beside_window, reading, bandwidth), strict=True)
    )
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak_memory(options.peak))
        return
    for part in options.parts:
        works[part]()


if __name__ == "__main__":
    main()
