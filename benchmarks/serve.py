"""64 clients at once for a minute, each answer compared with the one that the same request gets alone.

python benchmarks/serve.py [SECONDS]
python benchmarks/serve.py turns    how long a tiny request waits beside one of 15 MB that has a prompt for every lane

The model is the preset `tiny`, random, in float64, so that what is written beside a text cannot change its last draw.
Clients ask for 8 to 64 tokens, greedily or with a seed; one request in ten is a stream that its client leaves.
"""

import asyncio
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx2
import torch

from rmkv_cli.config import load_config, preset_path
from rmkv_cli.model import RMKV
from rmkv_cli.tokenizer import train_tokenizer

CLIENTS, REQUESTS, LANES = 64, 48, 16
TEXT = "the cat sat on the mat, and the dog sat on the log. "


@dataclass
class Found:
    """What the clients found."""

    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    left: int = 0
    errors: int = 0
    mixed_up: int = 0


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, int]]:
    """Give the address and the process id of `rmkv serve` with a random model."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(iter([TEXT * 20]), 300)
    shape = load_config(preset_path("tiny"), [f"model.vocab_size={tokenizer.vocab_size}"]).model
    RMKV(shape).double().save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    command = [sys.executable, "-m", "rmkv_cli", "serve", "--model", str(folder), "--port", "0", "--lanes", str(LANES)]
    process = subprocess.Popen([*command, "--device", "cpu"], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        address = re.search(r"http://\S+:\d+", line)
        assert address, line
        yield address[0], process.pid
    finally:
        process.terminate()
        process.wait()


def request_of(number: int) -> dict[str, Any]:
    """Return one of the requests."""
    draw = random.Random(number)
    sampling = draw.choice([{"temperature": 0}, {"seed": draw.randrange(1000)}])
    return {"prompt": TEXT * draw.randint(0, 8), "max_tokens": draw.randint(8, 64), **sampling}


def resident(process: int) -> float:
    """Return the MB of memory that a process has in use."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


async def ask(client: httpx2.AsyncClient, number: int) -> tuple[str, int]:
    """Return the text that answers a request, and its tokens."""
    answer = await client.post("/v1/completions", json=request_of(number))
    answer.raise_for_status()
    body = answer.json()
    return body["choices"][0]["text"], body["usage"]["completion_tokens"]


async def work(url: str, seed: int, alone: list[tuple[str, int]], until: float, found: Found) -> None:
    """Be one client, until the time is over."""
    draw = random.Random(seed)
    async with httpx2.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:
        while time.monotonic() < until:
            number, start = draw.randrange(REQUESTS), time.monotonic()
            try:
                if draw.random() < 0.1:
                    async with client.stream(
                        "POST", "/v1/completions", json=request_of(number) | {"stream": True}
                    ) as it:
                        await anext(it.aiter_lines())
                    found.left += 1
                    continue
                got = await ask(client, number)
            except httpx2.HTTPError:
                found.errors += 1
                continue
            found.seconds.append(time.monotonic() - start)
            found.tokens += got[1]
            found.mixed_up += got != alone[number]


async def load(url: str, seconds: float, alone: list[tuple[str, int]]) -> tuple[Found, float]:
    """Return what the clients found, and the seconds that it took."""
    found, start = Found(), time.monotonic()
    await asyncio.gather(*(work(url, i, alone, start + seconds, found) for i in range(CLIENTS)))
    return found, time.monotonic() - start


async def measure(url: str, process: int, seconds: float) -> None:
    """Load the server and print the figures."""
    async with httpx2.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:
        start = time.monotonic()
        alone = [await ask(client, number) for number in range(REQUESTS)]
        rate = sum(tokens for _, tokens in alone) / (time.monotonic() - start)
        print(f"one client: {rate:,.0f} tokens/s")
        await load(url, min(seconds, 10), alone)  # warms up
        before = resident(process)
        found, took = await load(url, seconds, alone)
        await asyncio.sleep(1)  # for those who left to be noticed
        idle = "rmkv_lanes_busy 0.0" in (await client.get("/metrics")).text
    cuts = quantiles(found.seconds, n=20)
    print(f"{CLIENTS} clients, {LANES} lanes, {took:.0f} s: {found.tokens / took:,.0f} tokens/s")
    print(f"  {len(found.seconds)} answers, {found.left} streams left; all lanes free at the end: {idle}")
    print(f"  {found.errors} errors, {found.mixed_up} answers that differ from the one alone")
    print(f"  time of an answer: p50 {cuts[9]:.2f} s, p95 {cuts[18]:.2f} s")
    print(f"  memory of the server: {before:.0f} MB before, {resident(process):.0f} MB after")


async def turns(url: str) -> None:
    """Print the latency of tiny requests: alone, beside a large text of words, and beside one long word."""
    async with httpx2.AsyncClient(base_url=url, timeout=1000, trust_env=False) as client:

        async def seconds() -> str:
            start = time.monotonic()
            answer = await client.post("/v1/completions", json={"prompt": "the cat", "max_tokens": 1})
            answer.raise_for_status()
            return f"{time.monotonic() - start:.2f}"

        await seconds()  # warm-up
        print("alone:", *[await seconds() for _ in range(5)])
        for unit in (TEXT, "abcdefghijklmnopqrstuvwxyz"):
            prompt = (unit * (1_000_000 // len(unit)))[: 15_000_000 // LANES]
            large = asyncio.create_task(client.post("/v1/completions", json={"prompt": [prompt] * LANES}))
            await asyncio.sleep(2)
            waits = [await seconds() for _ in range(5)]
            print(f"beside {LANES} prompts of {len(prompt):,} bytes, '{unit[:8]}...':", *waits)
            print("  the large one is", "done" if large.done() else "still read")
            large.cancel()
            await asyncio.sleep(2)


def main() -> None:
    """Serve, load and measure."""
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as (url, process):
        if sys.argv[1:] == ["turns"]:
            asyncio.run(turns(url))
        else:
            asyncio.run(measure(url, process, float(sys.argv[1]) if len(sys.argv) > 1 else 60))


if __name__ == "__main__":
    main()
