"""Runs that learn from the model's own answers: which answers count, their gradient, and exact resuming."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from compare_runs import assert_same_run, killed_after, stopped_and_resumed, weights
from small_exercises import RECALL
from small_model import make_model

from rmkv_cli.config import Config
from rmkv_cli.data.lanes import IGNORED
from rmkv_cli.errors import UserError
from rmkv_cli.model import RMKV
from rmkv_cli.report.run import read_run
from rmkv_cli.report.verdict import verdict
from rmkv_cli.tokenizer import Tokenizer
from rmkv_cli.training import dry_run, profile, train
from rmkv_cli.training.metrics import read_metrics
from rmkv_cli.training.objective import Objective
from rmkv_cli.training.rollouts import AnswerBatch, Rollouts, learn

WORDS = {"kind": "spelling", "letters": [2]}


def steps(run):
    return [record for record in read_metrics(run / "metrics.jsonl") if "grad_norm" in record]


def rollouts_of(config, *, keep_all=False):
    source = Path(config.train.from_model)
    return Rollouts(config.train, Tokenizer.load(source), RMKV.from_pretrained(source), keep_all=keep_all)


def test_the_model_answers_and_training_agrees_with_decoding(answering, tmp_path):
    run = train(answering(RECALL, WORDS), tmp_path / "run").run
    records = steps(run)
    assert len(records) > 4
    assert {record["level"].split()[0] for record in records} == {"recall", "spelling"}
    assert all(0 <= record["reward"] <= record["solved"] <= 1 for record in records)
    assert 0 < max(record["logprob_gap"] for record in records) < 1e-4
    assert any(record["grad_norm"] > 0 for record in records)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopped_and_resumed_it_is_bit_for_bit_the_same(answering, tmp_path, monkeypatch, precision):
    config = answering(RECALL, WORDS, precision=precision)
    whole = train(config, tmp_path / "whole").run
    assert_same_run(whole, stopped_and_resumed(monkeypatch, config, tmp_path / "run"))


@pytest.mark.slow
def test_killed_in_the_middle_of_a_step_it_ends_the_same(answering, tmp_path, monkeypatch):
    config = answering(keep_last=99)
    whole = train(config, tmp_path / "whole").run
    run = killed_after(whole, 4)
    learned = []
    with monkeypatch.context() as patched:

        def killed(answered, objective):
            learned.append(answered)
            if len(learned) == 2:
                raise KeyboardInterrupt
            return learn(answered, objective)

        patched.setattr("rmkv_cli.training.trainer.learn", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, run, resume=True)
    assert_same_run(train(config, run, resume=True).run, whole)


def test_advantages_are_scores_less_the_mean_of_their_group(answering):
    answered = rollouts_of(answering(samples=4, batch_size=32)).next(0)
    means = {round(float(x) % 1, 6) for x in answered.advantages}  # of 4 scores that are 0 or 1
    assert means <= {0.25, 0.5, 0.75}
    assert answered.advantages.sum().item() == pytest.approx(0, abs=1e-6)
    assert (answered.rows[1] != IGNORED).sum(1).tolist() == [1] * len(answered.advantages)


@pytest.mark.slow
def test_exercises_do_not_depend_on_the_draw_of_their_levels(answering):
    rollouts = rollouts_of(answering({"kind": "spelling", "letters": [2, 3]}, batch_size=4, max_tokens=1))
    first_letters = {2: set(), 3: set()}
    for step in range(60):
        word = rollouts.next(step).record["rollout"]["prompt"].split('"')[1]
        first_letters[len(word)].add(word[0])
    for letters in first_letters.values():
        assert letters & set("bdfgkl")
        assert letters & set("mnprstvz")


def test_groups_of_equal_scores_teach_nothing(answering):
    answered = rollouts_of(answering({"kind": "spelling", "letters": [40]})).next(0)
    assert answered.record["reward"] == 0
    assert (answered.rows.shape[1], answered.counted) == (0, 0)
    assert answered.read > 0


def test_answers_that_are_cut_teach_only_with_a_teacher(answering):
    config = answering(WORDS, max_tokens=1)
    alone, taught = rollouts_of(config).next(0), rollouts_of(config, keep_all=True).next(0)
    assert alone.record["cut"] > 0.5
    assert alone.rows.shape[1] == 0
    assert taught.rows.shape[1] == 8
    assert not taught.advantages.any()


def test_the_gradient_is_the_policy_gradient_of_each_document_alone():
    student = make_model(hidden_size=12, num_attention_heads=3).requires_grad_(True)
    torch.manual_seed(0)
    rows = torch.full((3, 3, 14), 0, dtype=torch.int32)
    rows[0], rows[1] = torch.randint(3, 13, (3, 14)), IGNORED
    spans = [(3, 6), (1, 9), (6, 14)]
    for row, (first, stop) in enumerate(spans):
        rows[1, row, first:stop] = torch.randint(3, 13, (stop - first,))
    advantages = torch.tensor([0.75, -0.25, 0.5])
    logprobs = torch.zeros(3, 14, dtype=torch.float64)
    expected = 0
    for row, (first, stop) in enumerate(spans):
        logits, _ = student(rows[0, row : row + 1, :stop].long())
        of_answer = logits[0, first:stop].log_softmax(-1)
        drawn = of_answer.gather(1, rows[1, row, first:stop, None].long())[:, 0]
        logprobs[row, first:stop] = drawn.detach()
        expected = expected - advantages[row] * drawn.sum() / 25
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    for size in (1, 2, 3):
        student.zero_grad()
        config = Config.model_validate({"train": {"batch_size": 6, "micro_batch_size": size}}).train
        answered = AnswerBatch(rows, advantages, logprobs, 25, 0, {})
        figures = learn(answered, Objective(student, config, None))
        assert figures.tolist() == pytest.approx([expected.item(), 0.0], rel=1e-9)
        assert answered.record["logprob_gap"] < 1e-12
        for name, gradient in gradients.items():
            torch.testing.assert_close(dict(student.named_parameters())[name].grad, gradient, rtol=1e-9, atol=1e-12)


def test_a_disagreement_of_decoding_and_training_stops_the_run(answering):
    config = answering()
    rollouts, model = rollouts_of(config), RMKV.from_pretrained(config.train.from_model)
    answered = next(found for step in range(9) if (found := rollouts.next(step)).rows.shape[1])
    answered.logprobs[0, (answered.rows[1, 0] != IGNORED).nonzero()[0]] += 1e-3
    line = r"a token's log probability differs by 1.0e-03 between decoding and training"
    with pytest.raises(UserError, match=line):
        learn(answered, Objective(model, config.train, None))


def test_levels_that_are_always_or_never_solved_are_drawn_least(answering):
    task = WORDS | {"letters": [2, 3, 4, 5]}
    rollouts = rollouts_of(answering(task, samples=2))
    rollouts.load_state_dict({"rates": [0.0, 0.5, 1.0, 0.9]})
    unsolved, even, solved, mostly = rollouts._frequencies()
    assert (unsolved / even, solved / even) == pytest.approx((0.1, 0.1))
    assert mostly / even == pytest.approx(0.18 / 0.5)  # two answers differ with probability 2 p (1 - p)


def test_with_itself_as_teacher_nothing_is_learned(answering, answerer, tmp_path):
    config = answering(WORDS, tokens=1, teacher={"model": str(answerer), "precision": "fp32"})
    (record,) = steps(train(config, tmp_path / "run").run)
    assert abs(record["kl"]) < 1e-6
    assert record["grad_norm"] < 1e-4


@pytest.mark.slow
def test_on_its_own_answers_a_student_approaches_its_teacher(answering, make_config, answerer, tmp_path):
    teacher = train(make_config(from_model=str(answerer), tokens=2000), tmp_path / "teacher").run
    config = answering(WORDS, max_tokens=16, tokens=12_000, teacher={"model": str(teacher), "precision": "fp32"})
    kl = [record["kl"] for record in steps(train(config, tmp_path / "run").run)]
    assert np.mean(kl[-5:]) < 0.5 * np.mean(kl[:5])


@pytest.mark.slow
def test_reward_rises(answering, answerer, tmp_path):
    config = answering(samples=8, batch_size=32, micro_batch_size=32, tokens=50_000)
    records = steps(train(config, tmp_path / "run").run)
    rewards = [record["reward"] for record in records]
    assert np.mean(rewards[:5]) < 0.9
    assert np.mean(rewards[-10:]) > 0.95
    assert not all(torch.equal(x, weights(answerer)[name]) for name, x in weights(tmp_path / "run").items())


def test_a_dry_run_answers_two_steps_and_leaves_nothing(answering, tmp_path):
    report = dry_run(answering(), tmp_path / "run")
    assert report["steps"] > 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_profile_has_whole_groups_of_answers(answering, tmp_path):
    report = profile(answering(samples=8, micro_batch_size=4), tmp_path / "run", 1)
    assert report["rows"] == 8


@pytest.mark.slow
def test_with_data_it_validates_and_its_report_begins_with_the_scores(answering, data, tmp_path):
    outcome = train(answering(data=str(data)), tmp_path / "run")
    assert outcome.validation["loss"] > 0
    records = [record for record in read_metrics(outcome.run / "metrics.jsonl") if "reward" in record]
    assert 20 <= len(records) < 30
    reward, solved = ([(r[key] + s[key]) / 2 for r, s in pairwise(records)] for key in ("reward", "solved"))
    text = verdict(read_run(outcome.run))
    assert " tokens of its own answers to exercises. From the first to the last tenth of its steps, the mean" in text
    assert f" score of its answers goes from {reward[0]:.3f} to {reward[-1]:.3f}, and the share of exercises" in text
    assert f" from {solved[0]:.0%} to {solved[-1]:.0%}. At its last validation the loss is " in text


@pytest.mark.slow
def test_adapters_learn_as_well(answering, tmp_path):
    config = answering(trainable="adapters", adapter={"rank": 2})
    assert any(record["grad_norm"] > 0 for record in steps(train(config, tmp_path / "run").run))


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"from_model": None}, "only a trained model can answer exercises; give one with --from MODEL"),
        ({"tasks": [RECALL | {"keys": 300}]}, "with the 7 special tokens it needs"),
    ],
)
def test_what_cannot_be_answered_is_refused(answering, tmp_path, keys, line):
    tasks = keys.pop("tasks", [])
    with pytest.raises(UserError, match=line):
        train(answering(*tasks, **keys), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"samples": 3}, "rollouts.samples = 3 does not divide batch_size = 8"),
        ({"mix": "pretrain"}, "roll-outs replace documents"),
        ({"compile": True}, "compile cannot be combined with rollouts"),
        ({"stages": [{"kind": "extend", "share": 1}]}, "stages cannot be combined with rollouts"),
        ({"model": {"dropout": 0.1}}, "train.rollouts needs model.dropout = 0, got 0.1"),
    ],
)
def test_what_cannot_be_combined_is_refused(answering, keys, line):
    with pytest.raises(ValueError, match=line):
        answering(**keys)
