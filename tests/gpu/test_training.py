import pytest
import torch
from compare_runs import curve, killed_after
from no_sync import no_sync
from trained_run import make_data, train_small_run

from rmkv_cli.config import ModelConfig, load_config
from rmkv_cli.model.experts import Experts
from rmkv_cli.model.precision import is_narrow, to_precision
from rmkv_cli.training import train
from rmkv_cli.training.loss import row_loss
from rmkv_cli.training.memory import estimated_memory, peak_memory

GOLDEN = [8.329854, 7.547549, 6.878, 6.35202, 5.873375, 5.365524, 4.901231, 4.459104]  # of the CPU, in float32


def losses(trainer, steps):
    return [trainer.train_step(2)["loss"] for _ in range(steps)]


def test_a_training_step_learns_in_bfloat16(make_trainer, preset):
    trainer = make_trainer(preset, precision="bf16")
    records = [trainer.train_step(2) for _ in range(6)]
    assert records[-1]["loss"] < records[0]["loss"]
    best = max(records, key=lambda record: record["tokens_per_second"])
    mfu = f"MFU {best['mfu']:.1%}" if "mfu" in best else "MFU unknown, as the device's peak is"
    print(f"\n{preset}: {best['tokens_per_second']:,.0f} tokens/s, {mfu}")


def test_losses_are_those_of_the_cpu_in_float32(make_trainer):
    found = losses(make_trainer("tiny", precision="fp32"), len(GOLDEN))
    assert found == pytest.approx(GOLDEN, rel=1e-3)


def test_bfloat16_learns_as_float32_does(make_trainer):
    wide, narrow = (losses(make_trainer("tiny", precision=precision), 30) for precision in ("fp32", "bf16"))
    assert wide[-1] < 0.8 * wide[0]
    assert narrow == pytest.approx(wide, rel=0.02)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.03)], ids=str)
def test_grouped_products_give_what_each_expert_gives_alone(device, dtype, tolerance):
    torch.manual_seed(0)
    experts = Experts(ModelConfig(hidden_size=72, experts=8, experts_per_token=8, expert_size=32))
    n = torch.randn(2, 100, 72, requires_grad=True)
    scores = torch.sigmoid(experts.router(n))  # every expert processes every token
    alone = sum(scores[..., e, None] * expert(n) for e, expert in enumerate(experts.feed_forwards))
    weights = [n, *experts.feed_forwards.parameters()]
    expected = [alone, *torch.autograd.grad(alone.square().sum(), weights)]
    to_precision(experts, dtype)
    experts.to(device)
    n = n.detach().to(device, dtype).requires_grad_()
    y = experts(n)
    found = [y, *torch.autograd.grad(y.float().square().sum(), [n, *experts.feed_forwards.parameters()])]
    for its, right in zip(found, expected, strict=True):
        assert (its.cpu().float() - right).norm() < tolerance * right.norm()


@pytest.mark.parametrize("trainable", ["all", ["memory start"]], ids=str)
def test_the_peak_of_memory_is_the_estimate(make_trainer, preset, device, trainable):
    if device == "cpu":
        pytest.skip("on a CPU the peak is the whole process's; tests/training/test_memory.py counts the tensors")
    trainer = make_trainer(preset, precision="bf16", trainable=trainable)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        trainer.train_step(4)
    estimated, peak = estimated_memory(trainer.config, 4, device), peak_memory(device)
    print(f"\n{preset}: {peak / 1e9:.2f} GB at the peak, {estimated / 1e9:.2f} GB estimated")
    assert peak == pytest.approx(estimated, rel=0.15)


def test_frozen_weights_stay_as_they_were_and_the_device_has_them_in_bfloat16_alone(make_trainer, device):
    trainer = make_trainer("tiny", precision="bf16", trainable=["norms", "memory"])
    frozen = {name: p for name, p in trainer.model.named_parameters() if not p.requires_grad and is_narrow(name)}
    before = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    found = losses(trainer, 20)
    assert found[-1] < found[0]
    assert {p.device.type for p in frozen.values()} == {"cpu"}
    working = dict(trainer.working.model.named_parameters())
    assert {(working[name].device.type, working[name].dtype) for name in frozen} == {(device, torch.bfloat16)}
    whole = trainer.whole_model().state_dict()
    assert {x.device.type for x in whole.values()} == {device}
    assert all(torch.equal(whole[name].cpu(), before[name].cpu()) for name in frozen)
    assert all(torch.equal(working[name].cpu(), before[name].cpu().bfloat16()) for name in frozen)


def test_a_training_segment_never_waits_for_the_device(make_trainer, device):
    trainer = make_trainer("tiny", precision="fp32")
    model, length = trainer.model.train(), trainer.config.model.segment_length
    ids = torch.arange(8 * length, device=device).view(8, length)
    documents = torch.zeros(ids.shape, dtype=torch.int64)
    row_loss(model, ids, ids, documents, trainer.state)[0].backward()  # libraries set themselves up
    with no_sync(device):
        row_loss(model, ids, ids, documents, trainer.state)[0].backward()


def test_a_killed_run_resumes_to_the_same_losses(tmp_path, device):
    whole = train_small_run(make_data(tmp_path / "mix"), tmp_path / "run", device=device, precision="bf16", keep_last=9)
    killed = killed_after(whole, 4)
    train(load_config(killed / "config.toml"), killed, resume=True)
    one, other = ({r["step"]: r["loss"] for r in curve(run) if "loss" in r} for run in (whole, killed))
    assert one.keys() == other.keys()
    assert list(other.values()) == pytest.approx(list(one.values()), rel=0 if device == "cpu" else 1e-3)


def test_rollouts_have_the_log_probabilities_that_training_computes(tmp_path, device):
    data = make_data(tmp_path / "mix")
    source = train_small_run(data, tmp_path / "run", device=device)
    tasks = [{"kind": "spelling", "letters": [3]}, {"kind": "recall", "segments": [2], "segment_length": 8}]
    keys = {"from_model": str(source), "batch_size": 8, "tokens": 3000, "rollouts": {"tasks": tasks, "max_tokens": 16}}
    teacher = {"model": str(source), "precision": "fp32"}  # so that every answer teaches
    run = train_small_run(data, tmp_path / "answers", device=device, teacher=teacher, **keys)
    gaps = [record["logprob_gap"] for record in curve(run) if "logprob_gap" in record]
    assert len(gaps) > 2
    assert 0 < max(gaps) < 1e-4
