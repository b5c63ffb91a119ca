"""A training run from its first step, or its last checkpoint, to its end."""

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rmkv_cli.config import Config, ModelConfig, dump_toml
from rmkv_cli.data.documents import Documents
from rmkv_cli.errors import UserError
from rmkv_cli.evaluation import measure
from rmkv_cli.files import sha256, whole_directory, write_text
from rmkv_cli.model import find_model
from rmkv_cli.model.pretrained import WEIGHTS
from rmkv_cli.progress import stderr
from rmkv_cli.tokenizer import Tokenizer
from rmkv_cli.training.checkpoint import load_training, mark_best, save_checkpoint, write_model
from rmkv_cli.training.display import Display
from rmkv_cli.training.interrupt import Interrupt, interruptible
from rmkv_cli.training.metrics import Metrics
from rmkv_cli.training.trainer import NonFiniteError, Trainer

STOPPED = {signal.SIGINT: 130, signal.SIGTERM: 0}  # exit codes


@dataclass(frozen=True)
class Outcome:
    """How a training ended."""

    run: Path
    step: int
    tokens: int
    validation: dict[str, Any] | None
    """The last validation's record, if there was one."""
    exit_code: int


def train(config: Config, run: Path, *, resume: bool = False, allow_noncausal: bool = False) -> Outcome:
    """Train in the folder `run`, which must be new, or with `resume` go on from its newest whole checkpoint.

    Ctrl-C and SIGTERM end the step, save and return. What a killed run does after `resume` is, on a CPU, bit for bit
    what it would have done.

    Raises:
        UserError: the config, the data, the tokenizer and the run do not fit together.
        NonFiniteError: the loss or the gradient is not a number; what led to it lies in the run's folder `failed`.
    """
    documents, validation, tokenizer = _open_data(config)
    if not resume:
        _check_new(config, run, allow_noncausal)
    trainer = Trainer(config, documents, resolve_device(config.train.device))
    manifest = sha256(Path(config.train.data or "") / "manifest.json")
    if resume:
        _go_on(trainer, run, manifest)
    else:
        run.mkdir(parents=True, exist_ok=True)
        write_text(run / "config.toml", dump_toml(config))
        tokenizer.save(run / "tokenizer.json")
    metrics = Metrics(run / "metrics.jsonl", trainer.step)
    job = _Job(trainer, run, manifest, tokenizer, validation, metrics)
    try:
        with interruptible() as interrupt, Display(trainer.tokens, config.train.tokens) as display:
            job.run_to_end(interrupt, display)
    finally:
        metrics.close()
    last = next((r["validation"] for r in reversed(metrics.records) if "validation" in r), None)
    code = 0 if interrupt.signal is None else STOPPED[signal.Signals(interrupt.signal)]
    return Outcome(run, trainer.step, trainer.tokens, last, code)


def resolve_device(device: str) -> str:
    """Return "cuda" or "cpu"; raise `UserError` if a GPU is asked for and none can be used."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device = 'cuda': PyTorch finds no GPU here; use 'auto' or 'cpu'")
    return device


@dataclass
class _Job:
    trainer: Trainer
    run: Path
    manifest: str
    tokenizer: Tokenizer
    validation: Documents | None
    metrics: Metrics

    def run_to_end(self, interrupt: Interrupt, display: Display) -> None:
        """Step until all tokens are seen or a signal asks to stop; save and evaluate when due and at the end."""
        config, trainer = self.trainer.config.train, self.trainer
        if trainer.step:
            self.evaluate(display)  # a kill may have come between saving and evaluating
        while not trainer.finished and interrupt.signal is None:
            try:
                record = trainer.train_step()
            except NonFiniteError as error:
                self.save_failure(error)
                raise
            if trainer.step % config.log_every == 0 or trainer.finished:
                self.metrics.add(record)
            display.step(record)
            if trainer.step % config.checkpoint_every == 0 or trainer.finished or interrupt.signal is not None:
                self.save()
            self.evaluate(display)

    def save(self) -> None:
        """Write a checkpoint of this step."""
        trainer = self.trainer
        training = trainer.state_dict() | {"manifest": self.manifest}
        save_checkpoint(self.run, trainer.step, trainer.model, self.tokenizer, training, trainer.config.train.keep_last)

    def evaluate(self, display: Display) -> None:
        """Measure the held-out loss if it is due at this step and not yet known, and mark the best checkpoint."""
        config, trainer = self.trainer.config.train, self.trainer
        due = trainer.step % config.eval_every == 0 or trainer.finished
        if self.validation is None or not due or self.metrics.has_validation(trainer.step):
            return
        report = measure(trainer.model, self.validation, max_tokens=config.eval_tokens, tokenizer=self.tokenizer)
        best = report.loss < self.metrics.best()
        figures = {"loss": report.loss, "perplexity": report.perplexity, "bits_per_byte": report.bits_per_byte}
        self.metrics.add({"step": trainer.step, "tokens": trainer.tokens, "validation": figures})
        if best:
            mark_best(self.run, self.run / "checkpoints" / f"step-{trainer.step:08d}")
        bits = f", {report.bits_per_byte:.3f} bits per byte" if report.bits_per_byte is not None else ""
        display.say(f"step {trainer.step:,}: validation loss {report.loss:.4f}{bits}{' (best)' if best else ''}")

    def save_failure(self, error: NonFiniteError) -> None:
        """Save the model before the bad step, the step's rows, and each parameter's gradient norm."""
        trainer = self.trainer
        path = self.run / "failed" / f"step-{error.record['step']:08d}"
        norms = {name: p.grad.norm().item() for name, p in trainer.model.named_parameters() if p.grad is not None}
        rows = {name: torch.from_numpy(x) for name, x in vars(error.rows).items()}
        with whole_directory(path) as aside:
            write_model(aside, trainer.model, self.tokenizer)
            save_file(rows, aside / "rows.safetensors")
            report = error.record | {"gradient_norms_after_clipping": norms}
            (aside / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        stderr().print(f"The weights were not changed. The model, the rows and the gradients' norms: {path}")


def _open_data(config: Config) -> tuple[Documents, Documents | None, Tokenizer]:
    """Return the documents to train on, those held out (None if there are none), and their tokenizer."""
    if config.train.data is None:
        raise UserError("no data: give --data DIR, a folder that `rmkv data mix` made")
    folder = Path(config.train.data)
    documents = Documents.open(folder, "train")
    tokenizer = Tokenizer.load(folder)
    if tokenizer.hash != documents.tokenizer_hash:
        raise UserError(f"{folder}: its tokenizer.json is not the one that the data was made with")
    _check_vocabulary(config.model, tokenizer, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    held_out = Documents.open(folder, "validation") if manifest["splits"]["validation"]["documents"] else None
    return documents, held_out, tokenizer


def _check_vocabulary(model: ModelConfig, tokenizer: Tokenizer, folder: Path) -> None:
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens, but model.vocab_size = {model.vocab_size}; "
            f"use --set model.vocab_size={tokenizer.vocab_size}"
        )


def _check_new(config: Config, run: Path, allow_noncausal: bool) -> None:
    if (run / "checkpoints").exists() or (run / "config.toml").exists():
        raise UserError(f"{run}: a run is there already; go on with it by --resume, or choose another --run")
    if config.model.memory.carry == "layers":
        line = "memory.carry = 'layers' is not causal: from the second layer up tokens read their own future"
        if not allow_noncausal:
            raise UserError(f"{line}. Such a model cannot generate. --allow-noncausal trains it, for comparison")
        stderr().print(f"warning: {line}; its loss means nothing", style="bold red")


def _go_on(trainer: Trainer, run: Path, manifest: str) -> None:
    """Load the run's newest whole checkpoint, if it has one yet."""
    if not (run / "checkpoints").is_dir():
        stderr().print(f"{run}: was stopped before its first checkpoint; starting anew")
        return
    checkpoint = find_model(run, training=True)
    saved = load_training(checkpoint, trainer.device)
    if saved["manifest"] != manifest:
        raise UserError(f"{trainer.config.train.data}: is not the data that {checkpoint} was trained on")
    trainer.load_state_dict(saved, load_file(checkpoint / WEIGHTS, trainer.device))
    stderr().print(f"going on from {checkpoint}")
