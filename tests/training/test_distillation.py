"""Runs with a teacher: micro-batches equal the whole batch, resuming is exact, and the student learns."""

import shutil

import numpy as np
import pytest
import torch
from compare_runs import assert_same_run, killed_after, stop_at, stopped_and_resumed, weights
from job import ranks
from safetensors.torch import load_file
from small_documents import EOD, make_documents
from small_model import make_model
from small_transformer import make_transformer

from rmkv_cli.config import Config, dump_toml, load_config, resumed_config
from rmkv_cli.data.lanes import Lanes, Prepared
from rmkv_cli.errors import UserError
from rmkv_cli.files import sha256
from rmkv_cli.huggingface import Wiring, import_transformer
from rmkv_cli.model import find_model
from rmkv_cli.model.groups import is_trained
from rmkv_cli.model.pretrained import read_config
from rmkv_cli.tokenizer import train_tokenizer
from rmkv_cli.training import dry_run, train
from rmkv_cli.training.distribution import Ranks
from rmkv_cli.training.metrics import read_metrics
from rmkv_cli.training.stages import CurrentStage
from rmkv_cli.training.teacher import RMKVTeacher, TransformersTeacher
from rmkv_cli.training.trainer import Trainer

SHAPE = {"num_hidden_layers": 2, "hidden_size": 16}  # of the Llama and its student
S = 5  # tokens of a segment of `make_model`
STAGES = [
    {"kind": "align", "share": 1, "trainable": ["memory", "store"], "learning_rate": 3e-2},
    {"kind": "distil", "share": 2, "segments_max": 3},
    {"kind": "extend", "share": 1, "segments_min": 4},
]


@pytest.fixture(scope="module")
def source(make_config, tmp_path_factory):
    """The run that students start from, with the same layers as the Llama."""
    folder = tmp_path_factory.mktemp("source")
    return find_model(train(make_config(seed=5, tokens=100, model=SHAPE), folder / "run").run)


@pytest.fixture(scope="module")
def teachers(make_config, tokenizer, tmp_path_factory):
    """A larger RMKV with other segments, and a Llama."""
    folder = tmp_path_factory.mktemp("teachers")
    larger = {"hidden_size": 32, "segment_length": 12, "num_hidden_layers": 3}
    run = train(make_config(seed=7, tokens=3000, checkpoint_every=60, eval_every=60, model=larger), folder / "run").run
    return {"rmkv": run, "llama": save_llama(folder / "llama", tokenizer)}


def save_llama(folder, tokenizer):
    """Write a small transformers model with this tokenizer; return the folder."""
    shape = SHAPE | {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 64}
    make_transformer("Llama", dtype=torch.float32, **shape).save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def distilling(make_config, source, teachers):
    """A function that makes the config of a student of a teacher."""

    def make(kind, **keys):
        teacher = {"model": str(teachers[kind]), "precision": "fp32"} | keys.pop("teacher", {})
        keys = {"from_model": str(source), "micro_batch_size": 2} | keys
        return make_config(model=SHAPE, teacher=teacher, **keys)

    return make


@pytest.fixture(scope="module")
def staged(distilling, tmp_path_factory):
    """The config of a run in stages that keeps all its checkpoints, and that run."""
    config = distilling("llama", stages=STAGES, keep_last=9)
    return config, train(config, tmp_path_factory.mktemp("staged") / "whole").run


def steps(run):
    return [record for record in read_metrics(run / "metrics.jsonl") if "grad_norm" in record]


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("kind", "stage"), [("rmkv", "distil"), ("llama", "distil"), ("llama", "align")])
def test_micro_batches_give_the_figures_and_gradients_of_the_whole_batch(kind, stage):
    texts = [np.random.default_rng(n).integers(3, 13, n).tolist() for n in (23, 25, 28, 21)]
    documents = make_documents(texts, answers=[None, [(20, 21)], [(3, 5), (8, 9)], []])
    student = make_model(hidden_size=16, num_attention_heads=4)
    if kind == "rmkv":
        teacher = RMKVTeacher(make_model(9, segment_length=7))
    else:
        teacher = TransformersTeacher(make_transformer("Llama", vocab_size=13, **SHAPE), 40, S)

    def step(size):
        keys = {"batch_size": 4, "micro_batch_size": size, "precision": "fp32"}
        config = Config.model_validate({"model": student.config.model_dump(), "train": keys})
        trainer = Trainer(config, Lanes(Prepared(documents, 0), 4, EOD), Ranks("cpu"))
        trainer.model.double().load_state_dict(student.state_dict())
        trainer.state = trainer.model.initial_state(4)
        trainer.objective.teacher, trainer.teacher_state = teacher, teacher.start(4)
        trainer._enter(CurrentStage(0, stage, config.train, 0.0, 1.0))
        figures = []
        for _ in range(2):  # in the second step the teacher's memory has an effect as well
            rows, counted = trainer._read(3 * S, None)
            found, trainer.state, trainer.teacher_state = trainer._accumulate(rows, counted)
            figures += found.tolist()
        return figures, {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}

    figures, gradients = step(4)
    for size in (1, 2):
        of_parts, its = step(size)
        assert of_parts == pytest.approx(figures, rel=1e-12)
        for name, gradient in gradients.items():
            torch.testing.assert_close(its[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "stages", "how"), [("rmkv", [], "fsdp"), pytest.param("llama", STAGES, "ddp", marks=pytest.mark.slow)]
)
@pytest.mark.usefixtures("float64")
def test_two_processes_distil_as_one_does(forker, distilling, tmp_path, kind, stages, how):
    config = distilling(kind, stages=stages, distributed=how, tokens=800)
    whole = train(config, tmp_path / "whole").run
    (tmp_path / "config.toml").write_text(dump_toml(config))
    job = ranks(forker, 2, "train", "--config", tmp_path / "config.toml", "--run", tmp_path / "run", FLOAT64=1)
    assert job.returncode == 0, job.stderr
    keys = ("tokens", "loss", "kl", "align", "grad_norm")
    curves = [
        [
            [record.get(key, 0) for key in keys]
            for record in read_metrics(run / "metrics.jsonl")
            if "grad_norm" in record
        ]
        for run in (whole, tmp_path / "run")
    ]
    assert len(curves[0]) > 3
    np.testing.assert_allclose(*curves, rtol=1e-9)
    for name, x in weights(whole).items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], x, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rmkv", "llama"])
def test_resumed_it_ends_bit_for_bit_as_if_it_had_not_been_stopped(distilling, tmp_path, monkeypatch, kind):
    config = distilling(kind, teacher={"share": 0.5, "temperature": 2.0}, precision="bf16")
    whole = train(config, tmp_path / "whole").run
    assert_same_run(whole, stopped_and_resumed(monkeypatch, config, tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_run_resumed_in_any_stage_equals_an_uninterrupted_one(staged, tmp_path, monkeypatch, stop):
    config, whole = staged
    assert_same_run(whole, stopped_and_resumed(monkeypatch, config, tmp_path / "run", stop))


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4])
def test_a_killed_run_resumes_from_its_checkpoint_and_ends_the_same(staged, step):
    config, whole = staged
    run = killed_after(whole, step)
    assert_same_run(train(config, run, resume=True).run, whole)


@pytest.mark.slow
def test_each_stage_has_its_own_parameters_and_records(distilling, tmp_path):
    config = distilling("llama", stages=STAGES, checkpoint_every=1, eval_every=100, keep_last=100)
    run = train(config, tmp_path / "run").run
    records = steps(run)
    kinds = ["align" if "align" in record else "distil" if "kl" in record else "extend" for record in records]
    assert list(dict.fromkeys(kinds)) == ["align", "distil", "extend"]
    assert all(("loss" in record) == (kind != "align") for record, kind in zip(records, kinds, strict=True))
    assert {record["segments"] for record, kind in zip(records, kinds, strict=True) if kind == "extend"} == {4}
    begun = kinds.count("align")
    before = load_file(f"{config.train.from_model}/model.safetensors")
    aligned = load_file(run / "checkpoints" / f"step-{begun:08d}" / "model.safetensors")
    after = weights(run)
    for name, x in before.items():
        assert torch.equal(aligned[name], x) or is_trained(name, STAGES[0]["trainable"])
    assert not torch.equal(aligned["blocks.1.store.taps"], before["blocks.1.store.taps"])
    assert not torch.equal(after["blocks.0.attention.qkv.weight"], aligned["blocks.0.attention.qkv.weight"])


@pytest.mark.slow
def test_a_student_approaches_a_larger_teacher(distilling, tmp_path):
    config = distilling("rmkv", tokens=5000, learning_rate=2e-2, checkpoint_every=400, eval_every=400)
    run = train(config, tmp_path / "run").run
    kl = [record["kl"] for record in steps(run)]
    assert np.mean(kl[-10:]) < 0.5 * np.mean(kl[:5])


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"teacher": {"model": "nowhere/near/it"}}, "no such folder"),
        ({"teacher": {"context": 999}}, "supports at most 64 tokens"),
        ({"segments_max": 9}, "rows of up to 72 tokens are longer than the teacher's 64: lower segments_max to 8"),
        ({"teacher": {"sha256": "0" * 64}}, "is not the model that the run learns from"),
        (
            {"teacher": {"model": None}, "stages": STAGES},
            "stages[1]: kind = 'distil' needs a teacher: --set train.teacher.model=",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_distilled_is_refused_in_a_line(distilling, tmp_path, keys, line):
    with pytest.raises(UserError) as error:
        train(distilling("llama", **keys), tmp_path / "run")
    assert line in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_another_tokenizer_is_refused(distilling, teachers, tmp_path):
    other = train_tokenizer(iter(["quite another text, " * 20]), 290)
    folder = save_llama(tmp_path / "other", other)
    with pytest.raises(UserError, match=r"tokenizer\.json: the teacher's tokenizer differs from the data's"):
        train(distilling("llama", teacher={"model": str(folder)}), tmp_path / "run")


def test_an_rmkv_cannot_align(distilling, tmp_path):
    with pytest.raises(UserError, match="kind = 'align' needs a transformers teacher"):
        train(distilling("rmkv", stages=STAGES), tmp_path / "run")


def test_layers_that_differ_cannot_be_aligned(distilling, tmp_path):
    config = distilling("llama", stages=[{"kind": "align", "share": 1}], from_model=None)
    other = config.model.model_copy(update={"num_hidden_layers": 3})
    with pytest.raises(UserError, match="has 2 that can be aligned, of width 16; the model has 3 of width 16"):
        train(config.model_copy(update={"model": other}), tmp_path / "run")


def test_a_trial_uses_rows_that_the_teacher_can_read(distilling, tmp_path):
    """The rows of the stage without the teacher are longer than its 64 tokens."""
    stages = [STAGES[0], {"kind": "extend", "share": 9, "segments_min": 20, "segments_max": 20}]
    assert dry_run(distilling("llama", stages=stages), tmp_path / "run")["steps"] > 0


@pytest.mark.slow
def test_the_run_records_its_teacher_and_refuses_another(distilling, teachers, tmp_path, monkeypatch):
    config = distilling("rmkv")
    stop_at(monkeypatch, 3)
    run = train(config, tmp_path / "run").run
    stop_at(monkeypatch, None)
    recorded = load_config(run / "config.toml").train.teacher
    place = find_model(teachers["rmkv"])
    assert (recorded.model, recorded.sha256) == (str(place.resolve()), sha256(place / "model.safetensors"))
    another = [f"train.teacher.model={config.train.from_model}"]
    with pytest.raises(UserError, match="is not the model that the run learns from"):
        train(resumed_config(run / "config.toml", another), run, resume=True)
    moved = shutil.copytree(place, tmp_path / "moved")
    resumed = resumed_config(run / "config.toml", [f"train.teacher.model={moved}"])
    assert_same_run(train(resumed, run, resume=True).run, train(config, tmp_path / "whole").run)


def test_an_import_has_nothing_to_learn_within_its_window(distilling, teachers, tmp_path):
    """Rows of one segment, in which student and teacher are equal, come first; longer rows follow."""
    import_transformer(str(teachers["llama"]), tmp_path / "imported", Wiring(segment_length=8, lookback=8), check=False)
    model = read_config(tmp_path / "imported")
    rounding = {"align": 1e-9, "kl": torch.finfo(torch.float32).eps}  # float32 rounds log probabilities to about eps
    for stage, figure in (("align", "align"), ("distil", "kl")):
        stages = [
            {"kind": stage, "share": 1, "segments_max": 1, "trainable": ["store"]},
            {"kind": stage, "share": 6, "segments_min": 4, "trainable": ["store"]},
        ]
        config = distilling("llama", from_model=str(tmp_path / "imported"), stages=stages, tokens=300)
        first, *others = steps(train(config.model_copy(update={"model": model}), tmp_path / stage).run)
        assert first[figure] < rounding[figure]
        assert others[-1][figure] > 1e-3


@pytest.mark.slow
def test_aligned_layers_approach_the_teachers(distilling, tmp_path):
    stages = [{"kind": "align", "share": 1}]
    keys = {"tokens": 4000, "learning_rate": 2e-2, "checkpoint_every": 400, "eval_every": 400, "stages": stages}
    found = [record["align"] for record in steps(train(distilling("llama", **keys), tmp_path / "run").run)]
    assert np.mean(found[-5:]) < 0.5 * np.mean(found[:5])
