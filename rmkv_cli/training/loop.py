"""A training run, from its first step or last checkpoint to its end."""

import json
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rmkv_cli.config import Config, dump_toml, load_mix
from rmkv_cli.data.lanes import EndOfData
from rmkv_cli.errors import UserError
from rmkv_cli.evaluation import report_on, write_sample
from rmkv_cli.files import atomic_directory, write_text
from rmkv_cli.generation import save_start
from rmkv_cli.model import find_model
from rmkv_cli.model.checkpoints import list_checkpoints
from rmkv_cli.model.tensors import save_tensors
from rmkv_cli.progress import stderr
from rmkv_cli.training.begin import pending_source, update_config, with_source
from rmkv_cli.training.checkpoint import (
    mark_best,
    read_progress,
    rewind,
    save_checkpoint,
    write_adapter,
    write_model,
    write_progress,
)
from rmkv_cli.training.data import MIX, Data, open_data, open_held_out
from rmkv_cli.training.display import Display
from rmkv_cli.training.distribution import Ranks, join_ranks, require_even_shares
from rmkv_cli.training.faults import MAX_BAD_STEPS, WINDOW, BadStepError
from rmkv_cli.training.files import record_files
from rmkv_cli.training.folder import check_run, lock_run
from rmkv_cli.training.interrupt import Interrupt, interruptible
from rmkv_cli.training.length import with_length
from rmkv_cli.training.loggers import Log, open_loggers
from rmkv_cli.training.memory import memory_errors_explained, require_memory
from rmkv_cli.training.metrics import Metrics, best_validation, read_metrics
from rmkv_cli.training.optimizer import longest_rows
from rmkv_cli.training.teacher import require_tokenizer_of_teacher, with_teacher
from rmkv_cli.training.tensors import finish_writing
from rmkv_cli.training.trainer import Trainer, make_trainer

MEMORY_FILE = "memory.safetensors"
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 0}


@dataclass(frozen=True)
class Outcome:
    """Result of a training run."""

    run: Path
    """Folder of the run."""
    step: int
    """Number of optimizer steps so far."""
    tokens: int
    """Number of tokens so far."""
    finished: bool
    """Whether training is complete."""
    validation: dict[str, Any] | None
    """Record of the last validation, if any."""
    exit_code: int
    """Exit code of the process."""


def train(config: Config, run: Path, *, resume: bool = False, allow_noncausal: bool = False) -> Outcome | None:
    """Train in the new folder `run`, or with `resume` continue from its newest intact checkpoint.

    After Ctrl-C or SIGTERM, finish the step, save and return. On a CPU, a killed and resumed run is bit for bit the run
    that was not killed. In a torchrun job, every process calls this, and all except rank 0 return None.

    Raises:
        UserError: config, data, tokenizer and run do not match.
        BadStepError: a step was bad and `on_bad_step` is "stop", or too many steps were bad. The run's folder `failed`
            has the details.
    """
    with memory_errors_explained(config), join_ranks(config.train.device) as ranks:
        if ranks.first:
            return _lead(config, run, ranks, resume, allow_noncausal)
        _follow(config, run, ranks)
        return None


def _lead(config: Config, run: Path, ranks: Ranks, resume: bool, allow_noncausal: bool) -> Outcome:
    """Run `train` on rank 0, which may be the only process."""
    config = with_teacher(with_source(check_run(config, run, resume=resume, allow_noncausal=allow_noncausal), run))
    require_even_shares(config.train.batch_size, config.train.micro_batch_size, ranks.count)
    if config.train.rollouts.tasks and ranks.count > 1:
        raise UserError("train.rollouts needs a single process; run it without --nproc and torchrun")
    with lock_run(run), open_data(config, run) as data:
        require_tokenizer_of_teacher(config, data.tokenizer)
        require_memory(config, longest_rows(config, data.phases), ranks.device, ranks.count)
        trainer = make_trainer(config, ranks, data)
        if (source := pending_source(config, run)) is not None:
            _on_all_ranks(trainer, "start_from", source)
        if resume:
            _resume(trainer, run, data)
            update_config(config, run)
        else:
            data.tokenizer.save(run / "tokenizer.json")
            if config.train.mix is not None and config.train.data is None:
                record_files(load_mix(run / MIX), run)
            write_text(
                run / "config.toml", dump_toml(config)
            )  # written last: its presence means that the run can be resumed
        metrics = Metrics(run / "metrics.jsonl", trainer.step)
        try:
            with (
                open_loggers(config, run, trainer.step) as log,
                interruptible() as interrupt,
                Display(trainer.tokens, config.train.tokens) as display,
                ThreadPoolExecutor(1) as background,
            ):
                trainer.interrupt = interrupt
                _Job(trainer, run, data, metrics, display, log, background).run_to_end(interrupt)
        finally:
            metrics.close()
        ranks.share(None)  # ends `_follow` on the other ranks
    last = next((r["validation"] for r in reversed(metrics.records) if "validation" in r), None)
    code = 0 if interrupt.signal is None else EXIT_CODES[signal.Signals(interrupt.signal)]
    return Outcome(run, trainer.step, trainer.tokens, trainer.finished, last, code)


def _follow(config: Config, run: Path, ranks: Ranks) -> None:
    """Run a rank other than 0: repeat rank 0's calls of the trainer until it ends."""
    phases = ranks.share()
    trainer = Trainer(with_length(config), None, ranks, phases, open_held_out(config, run))
    with interruptible() as trainer.interrupt:
        while (call := ranks.share()) is not None:
            method, arguments = call
            with suppress(BadStepError, EndOfData, UserError):  # rank 0 raises and handles the same error
                getattr(trainer, method)(*arguments)


def _on_all_ranks(trainer: Trainer, method: str, *arguments: Any) -> Any:
    """Call a method of the trainer on all ranks; return the result on this rank, 0."""
    trainer.ranks.share((method, arguments))
    return getattr(trainer, method)(*arguments)


@dataclass
class _Job:
    """A run on rank 0: the trainer, and everything that the run writes."""

    trainer: Trainer
    run: Path
    data: Data
    metrics: Metrics
    display: Display
    log: Log
    background: Executor
    saving: Future[None] | None = None
    """Future of the checkpoint that is being written."""

    def run_to_end(self, interrupt: Interrupt) -> None:
        """Train until all tokens are seen or a signal arrives; save and evaluate when due and at the end."""
        config, trainer = self.trainer.config.train, self.trainer
        saved = trainer.step
        self.evaluate()  # in case the run was killed between saving and evaluating
        while not trainer.finished and interrupt.signal is None:
            try:
                record = _on_all_ranks(trainer, "train_step")
                self.display.step(record)
            except BadStepError as error:
                record = self.skip_step(error)
            except EndOfData as end:
                self.display.say(f"{end}, after {trainer.tokens:,} of {config.tokens:,} tokens")
                trainer.ended = True
                break
            if self.saving is not None and self.saving.done():
                self.finish_saving()
            if trainer.step % config.log_every == 0 or trainer.finished or "bad_step" in record:
                self.add(record)
            if trainer.step % config.checkpoint_every == 0 or trainer.finished or "rolled_back_to" in record:
                self.save()
                saved = trainer.step
            self.evaluate()
        if saved != trainer.step:
            self.save()
        self.evaluate()
        self.finish_saving()

    def add(self, record: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl, and send it to the loggers."""
        self.metrics.add(record)
        self.log(record)

    def save(self) -> None:
        """Start to write a checkpoint of this step, after the previous one is complete."""
        self.finish_saving()
        _, best = best_validation(self.metrics.records)
        keep, step = self.trainer.config.train.keep_last, self.trainer.step
        self.saving = save_checkpoint(self.run, step, self.fill, self.background, keep, best)

    def finish_saving(self) -> None:
        """Wait until the current checkpoint is complete; raise `UserError` if it cannot be written."""
        if self.saving is not None:
            saving, self.saving = self.saving, None
            _on_all_ranks(self.trainer, "finish_saving")
            saving.result()

    def fill(self, folder: Path) -> Callable[[], None]:
        """Start to write what training resumes from; return a function that writes the model and waits for the rest.

        Everything that later steps change is copied before this returns.
        """
        trainer, config = self.trainer, self.trainer.config.train
        progress = {
            "step": trainer.step,
            "tokens": trainer.tokens,
            "lanes": trainer.source.state_dict(),
            "data": self.data.hash,
            "optimizer": trainer.config.train.optimizer,
            "watch": trainer.watch.state_dict(),
        }
        model = _on_all_ranks(trainer, "checkpoint_model")
        written = _on_all_ranks(trainer, "save", folder)

        def write() -> None:
            try:
                if config.trainable == "adapters":
                    assert config.from_model
                    assert config.from_sha256
                    base = Path(config.from_model)
                    write_adapter(folder, model, self.data.tokenizer, base, config.from_sha256)
                else:
                    write_model(folder, model, self.data.tokenizer)
                if config.ever_trainable == ["memory start"]:
                    save_start(folder / MEMORY_FILE, model, self.data.tokenizer)
                write_progress(folder, progress)
            finally:
                wait([written])  # so that the folder is not removed during a write
            finish_writing(folder, written)

        return write

    def evaluate(self) -> None:
        """If due and not done at this step, measure the held-out loss, generate a sample and mark the best
        checkpoint."""
        config, trainer = self.trainer.config.train, self.trainer
        due = trainer.step % config.eval_every == 0 or trainer.finished
        if self.data.held_out is None or not trainer.step or not due or self.metrics.has_validation(trainer.step):
            return
        tokenizer = self.data.tokenizer
        losses, model = _on_all_ranks(trainer, "validate")
        report = report_on(self.data.held_out, losses, tokenizer)
        lowest, _ = best_validation(self.metrics.records)
        best = report.loss < lowest
        self.finish_saving()  # so that the checkpoint of a recorded best exists
        if best:  # before the record: if the run is killed in between, both are repeated
            mark_best(self.run, trainer.step)
        figures = {"loss": report.loss, "perplexity": report.perplexity, "bits_per_byte": report.bits_per_byte}
        sample = write_sample(model, self.data.held_out, tokenizer)
        record = {"step": trainer.step, "tokens": trainer.tokens, "validation": figures}
        self.add(record | ({"sample": sample} if sample else {}))
        bits = f", {report.bits_per_byte:.3f} bits per byte" if report.bits_per_byte is not None else ""
        self.display.say(f"step {trainer.step:,}: validation loss {report.loss:.4f}{bits}{' (best)' if best else ''}")

    def skip_step(self, error: BadStepError) -> dict[str, Any]:
        """Skip a bad step, roll back or stop, as `on_bad_step` says; return the step's record.

        After a rollback the caller saves a checkpoint at once, so that a killed run does not read the bad rows again.
        Before the first checkpoint a rollback only skips the step.

        Raises:
            BadStepError: `on_bad_step` is "stop", or too many recent steps were bad.
        """
        self.finish_saving()
        trainer, action = self.trainer, self.trainer.config.train.on_bad_step
        if too_many := trainer.watch.too_many(error.record["step"]):
            self.display.say(f"{MAX_BAD_STEPS} of the last {WINDOW} steps have already been skipped")
        if too_many or action == "stop":
            self.save_failure(error)
            raise error
        _on_all_ranks(trainer, "skip_step", error.record["step"], error.record["tokens"])
        kept = {key: error.record[key] for key in ("step", "tokens", "learning_rate", "segments")}
        record = kept | {"bad_step": error.reason, "bad_steps": len(trainer.watch.bad_steps)}
        if action == "rollback" and list_checkpoints(self.run):
            checkpoint = find_model(self.run, training=True)
            saved = read_progress(checkpoint)
            watch = saved["watch"] | {"bad_steps": trainer.watch.bad_steps}
            _on_all_ranks(trainer, "load", checkpoint, trainer.step, trainer.tokens, watch)
            record["rolled_back_to"] = saved["step"]
            self.display.say(f"{error}; skipped, rolled back to the weights of step {saved['step']:,}")
        else:
            self.display.say(f"{error}; skipped")
        return record

    def save_failure(self, error: BadStepError) -> None:
        """Save what the bad step began from (weights and states), its rows, and each parameter's gradient norm."""
        trainer = self.trainer
        path = self.run / "failed" / f"step-{error.record['step']:08d}"
        shutil.rmtree(path, ignore_errors=True)  # from an earlier failure of the same step
        norms = _on_all_ranks(trainer, "gradient_norms")
        rows = {name: torch.from_numpy(x) for name, x in vars(error.rows).items()}
        with atomic_directory(path) as temporary:
            self.fill(temporary)()
            save_tensors(rows, temporary / "rows.safetensors")
            report = error.record | {"gradient_norms": norms}
            (temporary / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        self.display.say(f"The weights are unchanged. Model, states, rows and gradient norms are saved in {path}")


def _resume(trainer: Trainer, run: Path, data: Data) -> None:
    """Load the run's newest intact checkpoint, if it has one yet."""
    records = read_metrics(run / "metrics.jsonl")
    if not list_checkpoints(run):
        steps = max((record["step"] for record in records), default=0)
        if steps > 2 * trainer.config.train.checkpoint_every:  # by then the first checkpoint is complete
            raise UserError(
                f"{run}: its checkpoints are missing, although it has trained for {steps:,} steps; restore one in "
                f"{run / 'checkpoints'}, or start a new run with another --run"
            )
        stderr().print(f"{run}: was stopped before its first checkpoint; starting from the beginning")
        return
    checkpoint = find_model(run, training=True)
    saved = read_progress(checkpoint)
    if saved["data"] != data.hash:
        raise UserError(f"{trainer.config.train.data or run / MIX}: is not the data that {checkpoint} was trained on")
    optimizer = trainer.config.train.optimizer
    if (saved_optimizer := saved.get("optimizer", optimizer)) != optimizer:
        raise UserError(
            f"{run / 'config.toml'}: train.optimizer: {checkpoint} has the state of '{saved_optimizer}'; "
            "restore that value"
        )
    trainer.source.load_state_dict(saved["lanes"])
    _on_all_ranks(trainer, "load", checkpoint, saved["step"], saved["tokens"], saved["watch"])
    _, best = best_validation(record for record in records if record["step"] <= saved["step"])
    rewind(run, checkpoint, trainer.config.train.keep_last, best)
    finished = "; training is complete" if trainer.finished else ""
    stderr().print(f"resuming from {checkpoint}{finished}")
