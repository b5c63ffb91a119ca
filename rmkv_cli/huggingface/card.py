"""The model card: description, usage, config, data, evaluation and training of a model."""

from pathlib import Path

from rmkv_cli.config import Config, ModelConfig, dump_toml, load_config, load_mix
from rmkv_cli.data.manifest import Manifest
from rmkv_cli.errors import UserError
from rmkv_cli.markdown import table
from rmkv_cli.model import RMKV
from rmkv_cli.model.checkpoints import FOLDER, checkpoint_step
from rmkv_cli.progress import plural
from rmkv_cli.report.data import data_table
from rmkv_cli.training.data import HELD_OUT, MIX
from rmkv_cli.training.metrics import read_metrics


def model_card(name: str, folder: Path, model: RMKV) -> str:
    """Return the README.md of a model called `name`; if its folder is a run's checkpoint, it also describes the run."""
    parts = [_description(name, model)]
    # Follow the link `latest` of a run, but not a link in place of a checkpoint that was moved.
    folder = folder.absolute() if folder.absolute().parent.name == FOLDER else folder.resolve()
    run = folder.parent.parent
    if folder.parent.name == FOLDER and (run / "config.toml").is_file():
        config = load_config(run / "config.toml")
        parts += [*_data(config, run), *_evaluation(config, run, folder), _training(config)]
    return "\n".join(parts)


def _description(name: str, model: RMKV) -> str:
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- rmkv
---

# {name}

A causal language model of {model.count_parameters():,} parameters (RMKV): attention over a short window, and a memory
of fixed size that each layer carries through the text.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```

The code beside the weights needs PyTorch and transformers 5, and no other package.

## Config

{table(["key", "value"], _settings(model.config))}
"""


def _settings(config: ModelConfig) -> list[list[str]]:
    settings = config.model_dump()
    memory = settings.pop("memory")
    return [[key, str(x)] for key, x in [*settings.items(), *((f"memory.{key}", x) for key, x in memory.items())]]


def _data(config: Config, run: Path) -> list[str]:
    """Return the part about the data, if they still exist."""
    try:
        if config.train.data is not None:
            manifest = Manifest.load(Path(config.train.data))
            tokens = sum(source.tokens for source in manifest.sources)
            return [f"## Data\n\n{tokens:,} tokens, prepared by `rmkv data mix`.\n\n{data_table(manifest)}\n"]
        return [f"## Data\n\nStreamed.\n\n{data_table(load_mix(run / MIX))}\n"]
    except UserError:
        return []


def _evaluation(config: Config, run: Path, folder: Path) -> list[str]:
    """Return the part with the checkpoint's figures on held-out documents, if it was evaluated."""
    step = checkpoint_step(folder)  # None for a folder that rmkv did not name
    records = [r for r in read_metrics(run / "metrics.jsonl") if r["step"] == step and "validation" in r]
    if not records:
        return []
    figures = [[name.replace("_", " "), f"{x:.4f}"] for name, x in records[-1]["validation"].items() if x is not None]
    read = f"{records[-1]['tokens']:,} tokens in {plural(records[-1]['step'], 'step')}"
    about = f"On {_measured(config, run)}, after {read}; loss in nats per token."
    return [f"## Evaluation\n\n{about}\n\n{table(['measure', 'value'], figures)}\n"]


def _measured(config: Config, run: Path) -> str:
    """Describe the text that the run's validations read."""
    try:
        held_out = Manifest.load(Path(config.train.data) if config.train.data else run / HELD_OUT).splits["validation"]
    except UserError:
        return f"at most {config.train.eval_tokens:,} tokens of held-out documents"
    if held_out.tokens <= config.train.eval_tokens:
        return f"all held-out documents ({held_out.tokens:,} tokens)"
    return (
        f"a sample of {config.train.eval_tokens:,} of {held_out.tokens:,} tokens of held-out documents, "
        "with each source and each length of documents in its share"
    )


def _training(config: Config) -> str:
    """Return the part with the command and the config, in which only the last component of each path is shown."""
    train = config.train
    named = {key: Path(path).name for key in ("data", "mix", "tokenizer") if (path := getattr(train, key)) is not None}
    config = config.model_copy(update={"train": train.model_copy(update=named)})
    return f"""\
## Training

```console
$ rmkv train --config config.toml
```

with this config.toml:

```toml
{dump_toml(config).strip()}
```
"""
