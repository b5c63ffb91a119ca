"""A step whose loss or gradient is not finite, or spikes, is refused, passed over, or rolled back from."""

import math

import pytest
import torch
from compare_runs import assert_same_run, curve, killed_after
from safetensors.torch import load_file

from rmkv_cli.data.documents import Documents
from rmkv_cli.data.lanes import Lanes, Prepared
from rmkv_cli.errors import UserError
from rmkv_cli.training import BadStepError, train
from rmkv_cli.training.checkpoint import read_progress
from rmkv_cli.training.faults import MAX_BAD_STEPS, MIN_NORMS, WINDOW, StepMonitor
from rmkv_cli.training.tensors import read_tensors
from rmkv_cli.training.trainer import Trainer


def progress_and_states(checkpoint):
    """What a checkpoint holds beside the weights and the optimizer's moments."""
    tensors = read_tensors(checkpoint, lambda _, shape, dtype: torch.empty(shape, dtype=dtype))
    return read_progress(checkpoint), {name: x for name, x in tensors.items() if name.startswith("state.")}


def poke_at(monkeypatch, step, poke):
    """Change the weights just before step number `step` is taken."""
    take = Trainer.train_step

    def poked(self):
        if self.step == step - 1:
            with torch.no_grad():
                poke(self.model)
        return take(self)

    monkeypatch.setattr(Trainer, "train_step", poked)


def test_only_numbers_far_above_the_median_are_spikes():
    watch = StepMonitor(spike_factor=3)
    assert watch.find_fault(5.0, 1e9) is None  # nothing is known yet
    for i in range(MIN_NORMS):
        watch.record_norm(1.0 + i % 2)
    assert watch.find_fault(5.0, 4.5) is None  # 3 times the median, 1.5
    assert "gradient norm 4.6, more than 3 times the usual 1.5" in watch.find_fault(5.0, 4.6)
    for _ in range(WINDOW):
        watch.record_norm(2.0)
    assert watch.find_fault(5.0, 6.0) is None
    assert len(watch.norms) == WINDOW
    assert StepMonitor(spike_factor=0).find_fault(5.0, 1e9) is None


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)])
def test_a_step_that_is_not_finite_is_bad_at_once(loss, norm):
    assert "not a finite number" in StepMonitor(spike_factor=0).find_fault(loss, norm)


def rare_token(data, segments):
    """Return the token that the fewest steps of a run read, but not its first two, and these steps; it has rows of so
    many segments."""
    lanes = Lanes(Prepared(Documents.open(data, "train"), seed=0), 4, eod=0)
    steps = [set(lanes.next(8 * n).input_ids.ravel().tolist()) for n in segments]
    where = {token: [i + 1 for i, ids in enumerate(steps) if token in ids] for token in set().union(*steps)}
    return min(((token, at) for token, at in sorted(where.items()) if at[0] > 2), key=lambda found: len(found[1]))


@pytest.mark.slow
def test_exactly_the_bad_steps_are_skipped(make_config, data, tmp_path, monkeypatch, capsys):
    """The embedding of a rare token is infinite: so is what becomes of each row that holds it, and of no other."""
    model = {"tie_word_embeddings": False}
    keys = {"tokens": 1000, "keep_last": 99, "checkpoint_every": 1, "eval_every": 100}
    config = make_config(model, on_bad_step="skip", **keys)
    plain = train(config, tmp_path / "plain")
    token, steps = rare_token(data, [record["segments"] for record in curve(plain.run) if "segments" in record])
    poke_at(monkeypatch, 1, lambda model: model.embedding.weight[token].fill_(math.inf))
    whole = train(config, tmp_path / "whole")
    bad = [record for record in curve(whole.run) if "bad_step" in record]
    assert capsys.readouterr().err.count("gradient norm nan; skipped\n") == len(bad)
    assert [(record["step"], record["bad_steps"]) for record in bad] == [(step, i + 1) for i, step in enumerate(steps)]
    assert len(steps) < whole.step / 2
    assert (whole.step, whole.tokens) == (plain.step, plain.tokens)
    before, after = (whole.run / "checkpoints" / f"step-{steps[0] - i:08d}" for i in (1, 0))
    left, right = (load_file(path / "model.safetensors") for path in (before, after))
    assert all(torch.equal(x, right[name]) for name, x in left.items())
    (left, states), (right, others) = (progress_and_states(path) for path in (before, after))
    assert all(torch.equal(x, others[name]) for name, x in states.items())
    assert left["lanes"] != right["lanes"]

    assert_same_run(whole.run, train(config, killed_after(whole.run, steps[0]), resume=True).run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("poke", "reason", "keys"),
    [
        pytest.param(
            lambda model: model.norm.weight[0].fill_(math.inf),
            "not a finite number",
            {},
            id="infinite",
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda model: model.norm.weight.mul_(100), "times the usual", {"spike_factor": 5}, id="spike"),
    ],
)
def test_a_rollback_restores_the_last_checkpoint_and_reads_on(
    make_config, tmp_path, monkeypatch, capsys, poke, reason, keys
):
    seldom = {"checkpoint_every": 6, "eval_every": 12}
    config = make_config(on_bad_step="rollback", tokens=2600, keep_last=99, **seldom, **keys)
    poke_at(monkeypatch, 25, poke)
    whole = train(config, tmp_path / "whole")
    (bad,) = [record for record in curve(whole.run) if "bad_step" in record]
    assert reason in bad["bad_step"]
    assert "; skipped, rolled back to the weights of step 24" in capsys.readouterr().err
    assert (bad["step"], bad["rolled_back_to"]) == (25, 24)
    good, anew = (whole.run / "checkpoints" / f"step-{step:08d}" for step in (24, 25))
    left, right = (load_file(path / "model.safetensors") for path in (good, anew))
    assert all(torch.equal(x, right[name]) for name, x in left.items())
    (left, states), (right, others) = (progress_and_states(path) for path in (good, anew))
    assert all(torch.equal(x, others[name]) for name, x in states.items())
    assert left["watch"]["norms"] == right["watch"]["norms"]
    assert (right["step"], right["tokens"]) == (25, bad["tokens"])
    assert left["lanes"] != right["lanes"]
    assert whole.step > 26
    assert whole.validation["loss"] < 6

    assert_same_run(whole.run, train(config, killed_after(whole.run, 25), resume=True).run)


def test_before_the_first_checkpoint_a_rollback_is_a_skip(make_config, tmp_path, monkeypatch):
    config = make_config(on_bad_step="rollback", tokens=200, checkpoint_every=100, eval_every=100)
    poke_at(monkeypatch, 2, lambda model: model.norm.weight[0].fill_(math.inf))
    poke_at(monkeypatch, 3, lambda model: model.norm.weight[0].fill_(1))
    (bad,) = [record for record in curve(train(config, tmp_path / "run").run) if "bad_step" in record]
    assert bad["step"] == 2
    assert "rolled_back_to" not in bad


@pytest.mark.slow
def test_too_many_bad_steps_end_the_training(make_config, tmp_path, monkeypatch, capsys):
    config = make_config(on_bad_step="skip", tokens=10_000)
    poke_at(monkeypatch, 3, lambda model: model.norm.weight[0].fill_(math.inf))
    with pytest.raises(BadStepError, match=f"step {3 + MAX_BAD_STEPS}: not a finite number"):
        train(config, tmp_path / "run")
    assert f"{MAX_BAD_STEPS} of the last {WINDOW} steps have already been skipped" in capsys.readouterr().err
    assert (tmp_path / "run" / "failed" / f"step-{3 + MAX_BAD_STEPS:08d}" / "rows.safetensors").exists()
    assert sum("bad_step" in record for record in curve(tmp_path / "run")) == MAX_BAD_STEPS


def test_a_factor_that_makes_usual_steps_bad_is_refused(make_config):
    with pytest.raises((UserError, ValueError), match=r"spike_factor = 0.5 would flag ordinary steps"):
        make_config(spike_factor=0.5)


def test_a_stage_has_its_own_norms():
    watch = StepMonitor(3.0)
    for _ in range(MIN_NORMS):
        watch.enter_stage(0)
        watch.record_norm(1.0)
    assert "more than 3 times the usual" in watch.find_fault(1.0, 9.0)
    resumed = StepMonitor(3.0)
    resumed.load_state_dict(watch.state_dict())
    for each in (watch, resumed):
        each.enter_stage(0)
        assert each.find_fault(1.0, 9.0)
        each.enter_stage(1)
        assert each.find_fault(1.0, 9.0) is None
