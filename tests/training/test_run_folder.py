"""Other files in a run's folder belong to the user: training never touches them, and never fails because of them."""

import os
import shutil
from pathlib import Path

import pytest
from compare_runs import assert_same_run, stop_at
from foreign_files import add_foreign, contents, immutable

from rmkv_cli.errors import UserError
from rmkv_cli.model import find_model
from rmkv_cli.model.checkpoints import checkpoint_path, checkpoint_step, list_checkpoints
from rmkv_cli.training import train
from rmkv_cli.training.trainer import Trainer


@pytest.fixture(scope="module")
def config(make_config):
    return make_config(tokens=600, keep_last=1)


def during(monkeypatch, step, act):
    """Call `act` before a step is taken."""
    take = Trainer.train_step

    def acting(self):
        if self.step == step - 1:
            act()
        return take(self)

    monkeypatch.setattr(Trainer, "train_step", acting)


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.slow
def test_files_added_while_a_run_trains_stay_unchanged(config, whole, tmp_path, monkeypatch):
    run, foreign = tmp_path / "run", {}
    during(monkeypatch, 6, lambda: foreign.update(contents(add_foreign(run / "checkpoints"))))
    train(config, run)
    assert foreign
    assert contents(foreign) == foreign
    assert names(run) == sorted({path.relative_to(run / "checkpoints").parts[0] for path in foreign} | {*names(whole)})
    assert_same_run(whole, run)


def test_foreign_files_stay_on_resuming_and_are_not_checkpoints(config, whole, stopped, capsys):
    foreign = contents(add_foreign(stopped / "checkpoints"))
    assert find_model(stopped).name == "step-00000007"
    train(config, stopped, resume=True)
    assert contents(foreign) == foreign
    assert "damaged" not in capsys.readouterr().err
    assert_same_run(whole, stopped)
    assert [path.name for path in list_checkpoints(stopped)] == names(whole)[::-1]


def test_a_checkpoint_that_cannot_be_removed_is_warned_of_once(make_config, stopped, capsys):
    """That of step 4, which is not the best any more after step 8; each checkpoint from then on tries to remove it."""
    config = make_config(tokens=1000, keep_last=1)
    old = checkpoint_path(stopped, 4)
    before = contents([old])
    with immutable(old):
        outcome = train(config, stopped, resume=True)
    assert outcome.finished
    assert contents([old]) == before
    warning = f"warning: {old} cannot be removed; remove it yourself, or the disk may fill up (operation not permitted)"
    assert capsys.readouterr().err.splitlines().count(warning) == 1
    train(config, stopped, resume=True)
    assert not old.exists()


def test_a_damaged_checkpoint_that_cannot_be_removed_is_reported_before_any_step(config, whole, stopped):
    newest = checkpoint_path(stopped, 7)
    (newest / "model.safetensors").write_bytes(b"")
    with immutable(newest), pytest.raises(UserError) as error:
        train(config, stopped, resume=True)
    assert str(error.value) == f"{newest}: is damaged and cannot be removed, but training needs its path; move it away"
    train(config, stopped, resume=True)
    assert_same_run(whole, stopped)


def test_where_no_link_can_be_made_it_trains_keeps_the_best_and_resumes(config, whole, tmp_path, monkeypatch, capsys):
    """As on exFAT, and on many network drives."""
    run = tmp_path / "run"

    def refused(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refused)
    with monkeypatch.context() as patched:
        stop_at(patched, 7)
        train(config, run)
    train(config, run, resume=True)
    assert_same_run(whole, run)
    assert names(run) == names(whole)
    assert {"latest", "best", ".latest.part"}.isdisjoint(path.name for path in run.iterdir())
    warned = [line.split(" cannot be")[0] for line in capsys.readouterr().err.splitlines() if "cannot be" in line]
    assert warned == [f"warning: {run / 'latest'}", f"warning: {run / 'best'}"]


def followed(run):
    """Copy a run as `cp -rL` does; its links become folders."""
    copy = Path(shutil.copytree(run, run.with_name("copy")))
    assert not (copy / "latest").is_symlink()
    return copy


def test_a_run_that_was_copied_with_its_links_followed_resumes_and_has_links_again(config, whole, stopped):
    copy = followed(stopped)
    train(config, copy, resume=True)
    assert_same_run(whole, copy)
    assert names(copy) == names(whole)
    assert (copy / "latest").readlink() == (whole / "latest").readlink()
    assert (copy / "best").readlink() == (whole / "best").readlink()


@pytest.mark.parametrize(
    "make",
    [
        lambda path: (path / "mine.txt").write_text("mine"),
        lambda path: (path / "model.safetensors").write_bytes(b"mine"),
        lambda path: (path / "empty").mkdir(),
        lambda path: shutil.rmtree(path) or path.write_text("mine"),
    ],
    ids=["more", "other", "an empty folder", "a file"],
)
def test_a_file_in_place_of_a_link_stays_unless_it_is_a_copy(config, whole, stopped, capsys, make):
    copy = followed(stopped)
    for link in ("latest", "best"):
        make(copy / link)
    before = contents([copy / "latest", copy / "best"])
    train(config, copy, resume=True)
    assert contents([copy / "latest", copy / "best"]) == before
    assert_same_run(whole, copy)
    assert names(copy) == names(whole)
    said = f"warning: {copy / 'latest'} cannot be linked to step-00000007; training continues without it (another file"
    assert capsys.readouterr().err.count(said) == 1


def test_checkpoints_that_were_moved_and_linked_are_read_and_only_their_links_removed(config, whole, stopped, tmp_path):
    """The folder of a larger disk, for instance. A link that leads nowhere is like a damaged checkpoint."""
    (tmp_path / "large").mkdir()
    moved = [checkpoint.rename(tmp_path / "large" / checkpoint.name) for checkpoint in list_checkpoints(stopped)]
    for place in moved:
        checkpoint_path(stopped, checkpoint_step(place)).symlink_to(place)
    checkpoint_path(stopped, 8).symlink_to("nowhere")
    before = contents(moved)
    train(config, stopped, resume=True)
    assert contents(moved) == before
    assert_same_run(whole, stopped)
    assert names(stopped) == names(whole)
    assert not any(checkpoint.is_symlink() for checkpoint in list_checkpoints(stopped))


def test_the_best_is_kept_and_linked_again_where_its_link_is_gone(config, whole, stopped, monkeypatch):
    (stopped / "best").unlink()
    seen = []
    during(monkeypatch, 8, lambda: seen.append((names(stopped), (stopped / "best").resolve().name)))
    train(config, stopped, resume=True)
    assert seen == [(["step-00000004", "step-00000007"], "step-00000004")]
    assert_same_run(whole, stopped)


def test_a_run_whose_checkpoints_are_gone_does_not_start_anew(config, whole, stopped, tmp_path):
    (stopped / "checkpoints").rename(tmp_path / "archive")
    before = (stopped / "metrics.jsonl").read_bytes()
    with pytest.raises(
        UserError, match="stopped: its checkpoints are missing, although it has trained for 7 steps; restore one"
    ):
        train(config, stopped, resume=True)
    assert (stopped / "metrics.jsonl").read_bytes() == before
    (stopped / "checkpoints").mkdir()
    shutil.move(tmp_path / "archive" / "step-00000007", stopped / "checkpoints")
    train(config, stopped, resume=True)
    assert_same_run(whole, stopped)


def test_a_new_run_replaces_nothing(streamed, tmp_path):
    """What a start that was killed has left is written again; what no start has left is the user's."""
    config, run = streamed(tokens=100), tmp_path / "run"
    (run / "held-out").mkdir(parents=True)
    (run / "held-out" / "book.txt").write_text("mine")
    (run / "mix.toml").write_text("mine")
    before = contents([run])
    with pytest.raises(UserError, match="run: contains other files and is not a run; choose another --run"):
        train(config, run)
    assert contents([run]) == before
    (run / ".lock").touch()
    train(config, run)
