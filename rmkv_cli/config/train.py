"""The training section of a config."""

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
    """The LoRA adapter that is trained if trainable = "adapters"."""

    rank: int = Field(16, ge=1, le=1 << 16)
    """Rank of the two low-rank matrices of each layer."""
    alpha: float = Field(32.0, gt=0)
    """Scale of the adapter: its output is multiplied by alpha / rank."""
    targets: list[str] = Field([])
    """Layers that get an adapter, by name or the end of a name, such as "attention.qkv"; empty: all linear layers and
    cells."""


class TeacherConfig(Section):
    """The model that a run is distilled from: see [distillation](distillation.md)."""

    model: str | None = None
    """A model folder, checkpoint or run; or a transformers causal model, as a folder or a name on the Hugging Face hub.
    By default there is no distillation."""
    sha256: str | None = None
    """SHA-256 of the teacher's weights. The run's config.toml records it, and a resumed run refuses other weights."""
    share: float = Field(1.0, gt=0, le=1)
    """Share of KL(teacher ‖ student) in the loss; the rest is cross-entropy."""
    temperature: float = Field(1.0, gt=0)
    """Divisor of both models' logits in the KL, whose gradient is multiplied by its square."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of the teacher's computations."""
    context: int | None = Field(None, ge=1)
    """Maximum number of tokens that a transformers teacher reads at once: a row and earlier tokens of its document. The
    default is the teacher's maximum length."""

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield an error for each broken rule across fields."""
        match fields:
            case {"model": None, "sha256": str()} | {"model": None, "context": int()}:
                yield "sha256 and context describe a teacher; set train.teacher.model"
        for name in ("share", "temperature"):
            if fields.get("model", "") is None and fields.get(name, 1.0) != 1.0:
                yield f"{name} = {fields[name]} needs a teacher; set train.teacher.model"


class RolloutsConfig(Section):
    """Reinforcement learning from the model's own answers to exercises: see [reinforcement
    learning](reinforcement.md)."""

    tasks: list[Exercises] = Field([])
    """Kinds of exercises, one `[[train.rollouts.tasks]]` table each. If empty, the run trains on documents."""
    samples: int = Field(8, ge=1, le=1 << 16)
    """Number of answers to each prompt. Each step has batch_size / samples prompts."""
    max_tokens: int = Field(512, ge=1)
    """Maximum number of tokens of an answer. Truncated answers get no reward; only a teacher makes them useful."""

    @property
    def longest(self) -> int:
        """Estimated length of the longest row in tokens."""
        noise = (max(task.segments) * task.segment_length for task in self.tasks if isinstance(task, TaskSource))
        return max(noise, default=0) + self.max_tokens


class Stage(Section):
    """One stage of a training run. Omitted keys have the values of `[train]`. The learning rate's schedule and the
    growth of rows span the stage instead of the run."""

    kind: Literal["align", "distil", "extend"]
    """align: match each layer's attention output to the teacher's, given the teacher's layer inputs. distil: the loss
    of `[train.teacher]`. extend: cross-entropy, without the teacher."""
    share: float = Field(gt=0)
    """Relative length: the stage gets share / (sum of all shares) of the run's tokens."""
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
        """Return the keys of `[train]` that the stage overrides, with their values."""
        return self.model_dump(exclude_none=True, exclude={"kind", "share"})


class TrainConfig(Section):
    """How to train the model. Lengths are in tokens, intervals in optimizer steps."""

    data: str | None = None
    """Folder of prepared data, from `rmkv data mix`; set by `--data`."""
    mix: str | None = None
    """Mix to stream if there is no `data`: a mix.toml or the name of a shipped mix."""
    tokenizer: str = "tokenizer.json"
    """Tokenizer for a streamed mix. Prepared data contain their own."""
    from_model: str | None = None
    """Model folder that provides the initial weights, `[model]` and the tokenizer; set by `--from`. By default, weights
    are random."""
    from_sha256: str | None = None
    """SHA-256 of that folder's model.safetensors. The run's config.toml records it, and the run refuses other
    weights."""
    tokens: int = Field(10_000_000_000, ge=1)
    """Number of tokens to train on."""
    epochs: float | None = Field(None, gt=0, le=1e6)
    """Number of passes over prepared data. It sets `tokens` when the run begins; give only one of the two."""
    batch_size: int = Field(64, ge=1, le=1 << 20)
    """Number of lanes over all processes. A lane is an endless stream of documents that gives one row per step."""
    micro_batch_size: int = Field(8, ge=1)
    """Number of lanes per forward pass. Gradients are accumulated over batch_size / micro_batch_size passes."""
    segments_min: int = Field(1, ge=1)
    """Minimum number of segments per row."""
    segments_max: int = Field(16, ge=1, le=1 << 20)
    """Maximum number of segments per row. The maximum grows from segments_min to this value over the first half of the
    training; each step draws its number uniformly from the current range."""
    trainable: str | list[str] = "all"
    """Parameters to train; the others are frozen. `"all"`, `"adapters"`, or a list of groups: `"memory"` (initial
    slots, pooling, cells), `"store"`, `"norms"`, `"embeddings"`, `"attention"`, `"feed_forward"` and `"memory start"`
    (initial slots and stores)."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer of the matrices of attention and feed-forward. AdamW trains everything else."""
    learning_rate: float = Field(6e-4, gt=0)
    """Highest learning rate, reached after the warm-up."""
    final_learning_rate: float = Field(6e-5, ge=0)
    """Learning rate of the last step."""
    schedule: Literal["cosine", "wsd"] = "wsd"
    """Schedule after the warm-up. cosine: a half cosine. wsd: constant, then a linear decay over the last `decay` of
    the tokens."""
    warmup: float = Field(0.01, ge=0, lt=1)
    """Share of the tokens over which the learning rate rises linearly from 0."""
    decay: float = Field(0.2, ge=0, lt=1)
    """Share of the tokens over which the learning rate falls at the end (schedule = "wsd" only)."""
    weight_decay: float = Field(0.1, ge=0)
    """Weight decay of the matrices of attention and feed-forward. Gates, norms, embeddings, biases and slots have
    none."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's decay rate of the gradients' running mean."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """AdamW's decay rate of the squared gradients' running mean."""
    clip_norm: float = Field(1.0, gt=0)
    """Norm to which larger gradients are clipped."""
    on_bad_step: Literal["stop", "skip", "rollback"] = "stop"
    """What to do if a step's loss or gradient is not finite or spikes. stop: end the training. skip: skip the step's
    rows. rollback: skip them and restore weights, optimizer and states from the last checkpoint."""
    spike_factor: float = Field(0.0, ge=0)
    """A gradient norm above this many times its running median is a spike. 0 disables the check."""
    z_loss: float = Field(0.0, ge=0)
    """Coefficient of log²Z, the squared log-partition of a token's logits, added to its loss but not to the reported
    loss. PaLM uses 1e-4."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: compute in bfloat16, except for slots, cells, stores and losses. The optimizer's weights and accumulated
    gradients stay in float32."""
    replay: bool = True
    """Recompute all segments of a row except the last in the backward pass (gradient checkpointing). Memory then holds
    the activations of one segment instead of a row, for up to a third more work."""
    compile: bool = False
    """Compile the training segment as one graph (torch.compile): slow to start, then faster. On a CPU this needs a C++
    compiler."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on. auto: a GPU if there is one."""
    distributed: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share the model. ddp: each keeps all weights. fsdp: each keeps a shard of weights and
    optimizer state. Steps compute with whole weights either way."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the initial weights, dropout, row lengths, and the order of prepared documents from the second epoch
    on."""
    log_every: int = Field(10, ge=1)
    """Steps between records in metrics.jsonl."""
    loggers: list[Literal["tensorboard", "trackio", "wandb"]] = Field([])
    """Services that also receive the records of metrics.jsonl."""
    eval_every: int = Field(500, ge=1)
    """Steps between validations; must be a multiple of checkpoint_every."""
    eval_tokens: int = Field(1_000_000, ge=1)
    """Maximum number of held-out tokens per validation. Every validation uses the same sample, in which sources and
    document lengths keep their shares."""
    checkpoint_every: int = Field(500, ge=1)
    """Steps between checkpoints."""
    keep_last: int = Field(3, ge=1)
    """Number of most recent checkpoints to keep, besides the best."""
    adapter: AdapterConfig = AdapterConfig()
    teacher: TeacherConfig = TeacherConfig()
    rollouts: RolloutsConfig = RolloutsConfig()
    stages: list[Stage] = Field([])
    """Consecutive stages of the run, one `[[train.stages]]` table each. If empty, a run with a teacher is one stage of
    kind distil."""

    @property
    def ever_trainable(self) -> str | list[str]:
        """Parameters that are trained in any stage, in the form of `trainable`."""
        ways = [stage.trainable or self.trainable for stage in self.stages] or [self.trainable]
        names = next((way for way in ways if isinstance(way, str)), None)
        return names or list(dict.fromkeys(name for way in ways for name in way))

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield an error for each broken rule across fields."""
        yield from _wrong_ranges(fields)
        match fields:
            case {"batch_size": batch, "micro_batch_size": micro_batch} if batch % micro_batch:
                yield f"micro_batch_size = {micro_batch} does not divide batch_size = {batch}"
        match fields:
            case {"eval_every": evaluated, "checkpoint_every": saved} if evaluated % saved:
                yield (
                    f"eval_every = {evaluated} is not a multiple of checkpoint_every = {saved}: "
                    f"each evaluated step needs a checkpoint"
                )
        match fields:
            case {"spike_factor": factor} if 0 < factor <= 1:
                yield f"spike_factor = {factor} would flag ordinary steps; it should be above 1, or 0"
        match fields:
            case {"schedule": "wsd", "warmup": warmup, "decay": decay} if warmup + decay > 1:
                yield f"warmup + decay = {warmup + decay} is above 1, the length of the training"
        match fields:
            case {"rollouts": RolloutsConfig(tasks=[_, *_])}:
                yield from _wrong_rollouts(fields)
        if "stages" in fields:
            yield from _wrong_stages(fields)


def _wrong_ranges(fields: dict[str, Any]) -> Iterator[str]:
    """Yield an error for each wrong key among those that a stage can override."""
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
            yield "mix: roll-outs replace documents; for validation, give prepared data with --data"
    for name in ("stages", "compile"):
        if fields.get(name):
            yield f"{name} cannot be combined with rollouts"


def _wrong_stages(fields: dict[str, Any]) -> Iterator[str]:
    for number, stage in enumerate(fields["stages"]):
        place, changes = f"stages[{number}]", stage.changes()
        if changes:
            yield from (f"{place}: {line}" for line in _wrong_ranges(fields | changes))
        if "adapters" in (stage.trainable, stage.trainable and fields.get("trainable")):
            yield f"{place}: trainable: an adapter is trained either in all stages or in none; remove this key"


class Config(Section):
    """The contents of a run's config.toml."""

    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()

    @staticmethod
    def broken_rules(fields: dict[str, Any]) -> Iterator[str]:
        """Yield an error for each broken rule across fields."""
        match fields:
            case {
                "model": ModelConfig(dropout=dropout),
                "train": TrainConfig(rollouts=RolloutsConfig(tasks=[_, *_])),
            } if dropout:
                yield f"train.rollouts needs model.dropout = 0, got {dropout}: answers are generated without dropout"
