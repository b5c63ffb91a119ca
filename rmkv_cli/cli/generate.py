"""`rmkv generate`."""

import io
import secrets
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rmkv_cli.cli.loading import Adapter, Device, Dtype, load_model
from rmkv_cli.cli.options import (
    FrequencyPenalty,
    Json,
    MinP,
    Model,
    NoRepeatNgram,
    PresencePenalty,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
    at_least,
    print_json,
)
from rmkv_cli.config import parse
from rmkv_cli.errors import UserError
from rmkv_cli.files import require_file
from rmkv_cli.progress import plural, progress, stderr

if TYPE_CHECKING:
    from rmkv_cli.generation import Generation, SamplingConfig

LONG = 100_000  # characters of a prompt from which prefill shows its progress


def generate(
    model: Model,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help='The beginning of the text; "" for none. [default: standard input]'),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read the prompt from a file; - is standard input.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT",
            help='Read --file as JSON lines, {"prompt": …} or {"messages": …}, and generate a text for each line.',
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(parser=at_least(0), metavar="N", help="With --out: number of texts to generate at once.")
    ] = 8,
    max_tokens: Annotated[int, typer.Option(parser=at_least(0), metavar="N", help="Generate at most N tokens.")] = 256,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    presence_penalty: PresencePenalty = 0.0,
    no_repeat_ngram: NoRepeatNgram = 0,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same text. [default: random; 0 with --out]")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be repeated.")
    ] = None,
    num_samples: Annotated[
        int, typer.Option(parser=at_least(0), metavar="N", help="Generate N texts, with seed, seed + 1, ...")
    ] = 1,
    state: Annotated[
        Path | None,
        typer.Option(metavar="NOTES", help="Continue from a state that `rmkv read` saved; the prompt follows it."),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Compile the decoding step; takes up to a minute, pays off for long texts."),
    ] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Show the share of the memory bandwidth that decoding used.")
    ] = False,
    adapter: Adapter = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Continue a prompt: --prompt, --file, or standard input.

    The text appears on stdout as it is generated. In a file or standard input, all line ends become newlines, and a
    final newline is not part of the prompt.
    """
    if num_samples < 1:
        raise UserError(f"num_samples: should be 1 or more, got {num_samples}")
    if out is not None and (file is None or prompt is not None):
        raise UserError("--out takes its prompts from --file FILE, which has one JSON object per line")
    text = "" if out else _prompt(prompt, file)

    from rmkv_cli.generation import Decoder, SamplingConfig, bandwidth_share, load_notes, read_prompt
    from rmkv_cli.generation import generate as write

    first_seed = seed if seed is not None else 0 if out else secrets.randbelow(2**31)
    values = {
        "repetition_penalty": repetition_penalty,
        "frequency_penalty": frequency_penalty,
        "presence_penalty": presence_penalty,
        "no_repeat_ngram": no_repeat_ngram,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
    }
    configs = [parse(SamplingConfig, values | {"seed": first_seed + i}, "sampling") for i in range(num_samples)]
    if out is not None and file is not None:
        loading = model, device, dtype, adapter
        _write_file(loading, file, out, configs, max_tokens, stop or (), batch_size, state, compiled, as_json)
        return
    rmkv, tokenizer = load_model(model, device, dtype, adapter)
    earlier = load_notes(state, rmkv, tokenizer) if state else None
    long = len(text) >= LONG
    with progress("reading the prompt", None, "tokens") if long else nullcontext(lambda tokens: None) as advance:
        beginning = read_prompt(rmkv, tokenizer, text, earlier, advance)
    decoder = Decoder(rmkv, compiled=compiled)
    samples = [write(rmkv, tokenizer, beginning, c, max_tokens, stop or (), decoder=decoder) for c in configs]
    for i, (sample, config) in enumerate(zip(samples, configs, strict=True)):
        if num_samples > 1 and not as_json:
            stderr().print(f"--- {i + 1} of {num_samples}, seed {config.seed} ---", style="bold")
        _write(sample, to_stdout=not as_json)
    tokens, seconds = sum(len(s.ids) for s in samples), sum(s.seconds for s in samples)
    read_rate, write_rate = beginning.tokens / beginning.seconds, tokens / seconds
    share = bandwidth_share(rmkv, write_rate) if stats else None
    if as_json:
        print_json(
            {
                "prompt": text,
                "prompt_tokens": beginning.tokens,
                "samples": [
                    {"text": s.text, "tokens": len(s.ids), "stop_reason": s.stop_reason, "seed": c.seed}
                    for s, c in zip(samples, configs, strict=True)
                ],
                "sampling": values,
                "tokens_per_second_reading": read_rate,
                "tokens_per_second_writing": write_rate,
                **({"bandwidth_share": share} if stats else {}),
            }
        )
    else:
        stderr().print(
            f"read {plural(beginning.tokens, 'token')} at {read_rate:,.0f}/s, "
            f"generated {tokens:,} at {write_rate:,.0f}/s, "
            f"ended by {', '.join(str(s.stop_reason) for s in samples)}; seed {first_seed}",
            style="dim",
        )
        if share is not None:
            stderr().print(f"decoding used {share:.0%} of the memory bandwidth", style="dim")


def _write_file(
    loading: tuple[Path, str, str, Path | None],
    file: Path,
    out: Path,
    configs: "Sequence[SamplingConfig]",
    max_tokens: int,
    stop: Sequence[str],
    batch_size: int,
    state: Path | None,
    compiled: bool,
    as_json: bool,
) -> None:
    """Generate a text for each line of a file, and print their number and rate."""
    if batch_size < 1:
        raise UserError(f"batch_size: should be 1 or more, got {batch_size}")

    from rmkv_cli.generation import Decoder, read_lines, write_lines

    lines = read_lines(file)
    rmkv, tokenizer = load_model(*loading)
    decoder = Decoder(rmkv, batch_size, compiled=compiled)
    start = time.perf_counter()
    texts = len(lines) * len(configs)
    with progress(f"writing {out}", texts, "texts") as advance:
        tokens, errors = write_lines(rmkv, tokenizer, lines, out, configs, max_tokens, stop, decoder, advance, state)
    rate = tokens / (time.perf_counter() - start)
    figures = {"out": str(out), "texts": texts, "errors": len(errors), "tokens": tokens, "tokens_per_second": rate}
    if as_json:
        print_json(figures)
    else:
        print(f"{out}: {plural(texts, 'text')}, {plural(tokens, 'token')} at {rate:,.0f}/s, reading included")
    if errors:
        raise UserError(f"{out}: {len(errors):,} of {plural(texts, 'text')} failed; the first: {errors[0]}")


def _prompt(prompt: str | None, file: Path | None) -> str:
    """Return the prompt; raise `UserError` if there are two, or the file is not UTF-8 text."""
    if prompt is not None and file is not None:
        raise UserError("give either --prompt or --file, not both")
    if prompt is not None:
        return prompt
    if file is not None and file != Path("-"):
        require_file(file)
        name, data = str(file), file.read_bytes()
    elif file is None and sys.stdin.isatty():
        return ""
    else:
        name, data = "standard input", sys.stdin.buffer.read()
    from rmkv_cli.generation import text_pieces

    return "".join(text_pieces(io.BytesIO(data), name)).removesuffix("\n")


def _write(sample: "Generation", to_stdout: bool) -> None:
    """Generate the text; with `to_stdout`, print it as it is generated, then a newline, even after Ctrl-C."""
    try:
        for piece in sample:
            if to_stdout:
                sys.stdout.write(piece)
                sys.stdout.flush()
    finally:
        if to_stdout:
            print(flush=True)
