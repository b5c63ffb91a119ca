"""How a model is trained."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from rmkv_cli.config.exercises import Exercises
from rmkv_cli.config.model import ModelConfig
from rmkv_cli.config.section import Section
from rmkv_cli.config.tasks import TaskSource
from rmkv_cli.errors import did_you_mean

TRAINABLE = ("memory", "store", "norms", "embeddings", "attention", "feed_forward", "memory start")
"""Groups of parameters that a list `trainable` selects."""


class AdapterConfig(Section):
    """The LoRA adapter that is trained where trainable = "adapters"."""

    rank: int = Field(16, ge=1, le=1 << 16)
    """Rank of the two matrices beside each layer's own."""
    alpha: float = Field(32.0, gt=0)
    """The adapter's part is scaled by alpha / rank."""
    targets: list[str] = Field([])
    """Layers that get one, by name or its end, such as "attention.qkv"; empty: all linear layers and cells."""


class TeacherConfig(Section):
    """The model that a run is distilled from: see [distillation](distillation.md)."""

    model: str | None = None
    """A model folder, checkpoint or run; or a transformers causal model, as a folder or a name on the Hugging Face hub.
    Without it there is no distillation."""
    sha256: str | None = None
    """SHA-256 of the teacher's weights. The run's config.toml records it, and a resumed run refuses other weights."""
    share: float = Field(1.0, gt=0, le=1)
    """Share of KL(teacher ‖ student) in the loss; the rest is cross-entropy."""
    temperature: float = Field(1.0, gt=0)
    """Divisor of both models' logits in the KL, whose gradient is multiplied by its square."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of the teacher's computations."""
    context: int | None = Field(None, ge=1)
    """Maximum number of tokens that a transformers teacher reads at once: a row, and earlier tokens of its document.
    Without it: the teacher's maximum length."""

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield what is wrong across fields."""
        match fields:
            case {"model": None, "sha256": str()} | {"model": None, "context": int()}:
                yield "sha256 and context describe a teacher; set train.teacher.model"
        for name in ("share", "temperature"):
            if fields.get("model", "") is None and fields.get(name, 1.0) != 1.0:
                yield f"{name} = {fields[name]} needs a teacher; set train.teacher.model"


class RolloutsConfig(Section):
    """Learning from the model's own answers to exercises: see [reinforcement learning](reinforcement.md)."""

    tasks: list[Exercises] = Field([])
    """Kinds of exercises, `[[train.rollouts.tasks]]`. Without any, the run trains on documents."""
    samples: int = Field(8, ge=1, le=1 << 16)
    """Answers to each prompt; batch_size / samples prompts are answered in a step."""
    max_tokens: int = Field(512, ge=1)
    """Maximum number of tokens of an answer. Answers that are cut there get no reward; they teach only with a
    teacher."""

    @property
    def longest(self) -> int:
        """Estimated length of the longest row in tokens."""
        noise = (max(task.segments) * task.segment_length for task in self.tasks if isinstance(task, TaskSource))
        return max(noise, default=0) + self.max_tokens


class Stage(Section):
    """One stage of a training run. Keys that it omits have the values of `[train]`. The schedule, warm-up and growth of
    rows run from the stage's beginning to its end."""

    kind: Literal["align", "distil", "extend"]
    """align: match each layer's attention output to the teacher's, given the teacher's layer inputs. distil: the loss
    of `[train.teacher]`. extend: cross-entropy, without the teacher."""
    share: float = Field(gt=0)
    """The stage gets share / (sum of all shares) of the run's tokens."""
    trainable: str | list[str] | None = None
    """Overrides train.trainable: "all", or a list of groups."""
    learning_rate: float | None = Field(None, gt=0)
    """Overrides train.learning_rate."""
    final_learning_rate: float | None = Field(None, ge=0)
    """Overrides train.final_learning_rate."""
    segments_min: int | None = Field(None, ge=1)
    """Overrides train.segments_min."""
    segments_max: int | None = Field(None, ge=1, le=1 << 20)
    """Overrides train.segments_max."""

    def changes(self) -> dict[str, Any]:
        """Return the keys of `[train]` that the stage overrides, with its values."""
        return self.model_dump(exclude_none=True, exclude={"kind", "share"})


class TrainConfig(Section):
    """How a model is trained. Lengths of training are in tokens; intervals are in optimizer steps."""

    data: str | None = None
    """The folder that `rmkv data mix` made; `--data` sets it."""
    mix: str | None = None
    """Without `data`: what is streamed, a mix.toml or the name of a shipped one."""
    tokenizer: str = "tokenizer.json"
    """Of a mix that is streamed; a prepared one has its own."""
    from_model: str | None = None
    """The model folder whose weights, `[model]` and tokenizer the run starts from; `--from` sets it. Without it the
    weights are random."""
    from_sha256: str | None = None
    """SHA-256 of its model.safetensors; the run's config.toml records it, and a run refuses another file."""
    tokens: int = Field(10_000_000_000, ge=1)
    """Tokens to train on."""
    epochs: float | None = Field(None, gt=0, le=1e6)
    """In place of `tokens`: how often to train on prepared data, which sets `tokens` when the run begins."""
    batch_size: int = Field(64, ge=1, le=1 << 20)
    """Number of lanes over all processes; each is an endless stream of documents and gives one row per step."""
    micro_batch_size: int = Field(8, ge=1)
    """Lanes a forward pass; gradients are accumulated over batch_size / micro_batch_size of them."""
    segments_min: int = Field(1, ge=1)
    """Fewest segments a row."""
    segments_max: int = Field(16, ge=1, le=1 << 20)
    """Most segments per row, reached half-way; each step draws its number from the range so far."""
    trainable: str | list[str] = "all"
    """Parameters that are trained; the others are frozen. `"all"`, `"adapters"`, or a list out of `"memory"` (slots'
    start, pooling, cells), `"store"`, `"norms"`, `"embeddings"`, `"attention"`, `"feed_forward"` and `"memory start"`
    (slots' and stores' start)."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Of the matrices of attention and feed-forward; all else is AdamW's."""
    learning_rate: float = Field(6e-4, gt=0)
    """The highest, after the warm-up."""
    final_learning_rate: float = Field(6e-5, ge=0)
    """Of the last step."""
    schedule: Literal["cosine", "wsd"] = "wsd"
    """After the warm-up: a half cosine, or stable and then a linear decay over the last `decay` of the tokens."""
    warmup: float = Field(0.01, ge=0, lt=1)
    """Share of the tokens over which the learning rate rises linearly."""
    decay: float = Field(0.2, ge=0, lt=1)
    """Share of the tokens over which it falls at the end (schedule = "wsd" only)."""
    weight_decay: float = Field(0.1, ge=0)
    """On matrices only: never on gates, norms, embeddings, biases or slots."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's decay of the mean of the gradients."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """AdamW's decay of the mean of their squares."""
    clip_norm: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    on_bad_step: Literal["stop", "skip", "rollback"] = "stop"
    """When a loss or gradient is not finite, or spikes. "skip": the step's rows are passed over. "rollback": the same,
    and weights, optimizer and states are again those of the last checkpoint."""
    spike_factor: float = Field(0.0, ge=0)
    """A gradient's norm above so many times its running median is a spike; 0: none is."""
    z_loss: float = Field(0.0, ge=0)
    """Times log²Z of a token's logits, added to its loss, but not to the loss that is shown; PaLM: 1e-4."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: compute in bfloat16, except for slots, cells, stores and losses, from one copy of the weights per step.
    The optimizer's weights and the sums of gradients stay float32."""
    replay: bool = True
    """Compute all segments of a row but the last again in the backward pass: up to a third more work, and activations
    of one segment, not a row."""
    compile: bool = False
    """Compile a segment of training as one graph (torch.compile): slow to start, then faster. On a CPU it needs a C++
    compiler."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    distributed: Literal["ddp", "fsdp"] = "ddp"
    """On several processes: each keeps all weights, or ("fsdp") a part of weights and optimizer state. A step computes
    with whole weights either way."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of the first weights, dropout, the rows' lengths, and prepared documents' order from the second epoch on."""
    log_every: int = Field(10, ge=1)
    """Steps from record to record in metrics.jsonl."""
    loggers: list[Literal["tensorboard", "trackio", "wandb"]] = Field([])
    """Where records are sent beside the run's metrics.jsonl."""
    eval_every: int = Field(500, ge=1)
    """Steps from validation to validation; a multiple of checkpoint_every."""
    eval_tokens: int = Field(1_000_000, ge=1)
    """Most held-out tokens in a validation. The sample is always the same; sources and document lengths keep their
    shares."""
    checkpoint_every: int = Field(500, ge=1)
    """Steps from checkpoint to checkpoint."""
    keep_last: int = Field(3, ge=1)
    """Checkpoints kept, besides the best."""
    adapter: AdapterConfig = AdapterConfig()
    teacher: TeacherConfig = TeacherConfig()
    rollouts: RolloutsConfig = RolloutsConfig()
    stages: list[Stage] = Field([])
    """Consecutive stages of the run. Without them, a run with a teacher is a single stage of kind distil."""

    @property
    def ever_trainable(self) -> str | list[str]:
        """Everything that is trainable in some stage, in the form of `trainable`."""
        ways = [stage.trainable or self.trainable for stage in self.stages] or [self.trainable]
        names = next((way for way in ways if isinstance(way, str)), None)
        return names or list(dict.fromkeys(name for way in ways for name in way))

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield what is wrong across fields."""
        yield from _wrong_ranges(fields)
        match fields:
            case {"batch_size": batch, "micro_batch_size": micro_batch} if batch % micro_batch:
                yield f"micro_batch_size = {micro_batch} does not divide batch_size = {batch}"
        match fields:
            case {"eval_every": evaluated, "checkpoint_every": saved} if evaluated % saved:
                yield (
                    f"eval_every = {evaluated} is not a multiple of checkpoint_every = {saved}: "
                    f"what is evaluated is saved first"
                )
        match fields:
            case {"spike_factor": factor} if 0 < factor <= 1:
                yield f"spike_factor = {factor} makes usual steps bad ones; it should be above 1, or 0"
        match fields:
            case {"schedule": "wsd", "warmup": warmup, "decay": decay} if warmup + decay > 1:
                yield f"warmup + decay = {warmup + decay} is above 1, the whole training"
        match fields:
            case {"rollouts": RolloutsConfig(tasks=[_, *_])}:
                yield from _wrong_rollouts(fields)
        if "stages" in fields:
            yield from _wrong_stages(fields)


def _wrong_ranges(fields: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the keys that a stage can override."""
    match fields:
        case {"trainable": str(name)} if name not in ("all", "adapters"):
            yield f"trainable should be 'all', 'adapters' or a list, such as ['norms', 'memory'], got '{name}'"
        case {"trainable": []}:
            yield "trainable is empty, so nothing would be trained"
        case {"trainable": list(names)} if unknown := [name for name in names if name not in TRAINABLE]:
            known = ", ".join(map(repr, TRAINABLE))
            hint = did_you_mean(unknown[0], TRAINABLE)
            yield f"trainable: there is no group '{unknown[0]}'{hint} (there are: {known})"
    match fields:
        case {"segments_min": least, "segments_max": most} if least > most:
            yield f"segments_min = {least} is above segments_max = {most}"
    match fields:
        case {"learning_rate": rate, "final_learning_rate": final} if final > rate:
            yield f"final_learning_rate = {final} is above learning_rate = {rate}"


def _wrong_rollouts(fields: dict[str, Any]) -> Iterator[str]:
    rollouts = fields["rollouts"]
    match fields:
        case {"batch_size": batch} if batch % rollouts.samples:
            yield f"rollouts.samples = {rollouts.samples} does not divide batch_size = {batch}"
    match fields:
        case {"mix": str(), "data": None}:
            yield "mix: roll-outs take the place of documents; for validation, give prepared data with --data"
    for name in ("stages", "compile"):
        if fields.get(name):
            yield f"{name} cannot be combined with rollouts"


def _wrong_stages(fields: dict[str, Any]) -> Iterator[str]:
    for number, stage in enumerate(fields["stages"]):
        place, changes = f"stages[{number}]", stage.changes()
        if changes:
            yield from (f"{place}: {line}" for line in _wrong_ranges(fields | changes))
        if "adapters" in (stage.trainable, stage.trainable and fields.get("trainable")):
            yield f"{place}: trainable: an adapter is trained in all stages or in none; remove this key"


class Config(Section):
    """Everything that a run directory's config.toml holds."""

    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield what is wrong across fields."""
        match fields:
            case {
                "model": ModelConfig(dropout=dropout),
                "train": TrainConfig(rollouts=RolloutsConfig(tasks=[_, *_])),
            } if dropout:
                yield f"train.rollouts needs model.dropout = 0, got {dropout}: answers are written without dropout"
