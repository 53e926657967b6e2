"""A run that was stopped and resumed is, bit for bit, the run that was never stopped."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from conftest import MODES, TINY, finish, run, saved_path

import train_graceful as t

STEPS = 14
# 5 batches an epoch, an evaluation every 4 steps, a row every 3: stops fall on every kind of boundary.
SCHEDULE = ["--steps", str(STEPS), "--eval-every", "4", "--log-every", "3", "--save-every", "6", "--warmup-steps", "3"]


def corpus_of(path: Path, windows: int) -> Path:
    text = b"".join(b"%d squared is %d; " % (n, n * n) for n in range(2000))
    path.write_bytes(text[: int(windows * 16 / 0.95) + 20])
    return path


def train(directory: Path | None, *args, stop=None) -> t.Run:
    """One session of the program in this process. stop is (what, step): a request made at that very moment."""
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        def remember(run, *run_args, init=t.Run.__init__):
            init(run, *run_args)
            runs.append(run)

        def batch_done(run, loss, original=t.Run.batch_done):
            if stop == ("batch", run.step + 1):
                run.monitor.hear(15)
            original(run, loss)

        def begin(run, original=t.Run.begin):
            if stop == ("batch", 0):
                run.monitor.hear(15)
            original(run)

        def validation_batches(data, original=t.ByteDataset.validation_batches):
            for batch in original(data):
                if stop == ("evaluation", runs[-1].step):
                    runs[-1].monitor.hear(15)
                yield batch

        patch.setattr(t.Run, "__init__", remember)
        patch.setattr(t.Run, "batch_done", batch_done)
        patch.setattr(t.Run, "begin", begin)
        patch.setattr(t.ByteDataset, "validation_batches", validation_batches)
        where = [] if directory is None else ["--checkpoint-dir", str(directory)]
        t.train(t.parse_options([*where, "--no-keyboard", *map(str, args)]))
    assert runs[-1].error is None
    return runs[-1]


def metrics_without_times(directory: Path) -> list[dict]:
    with open(directory / "metrics.csv") as file:
        return [{key: value for key, value in row.items() if key not in ("tokens_per_second", "seconds")}
                for row in csv.DictReader(file)]


def assert_same(left, right, where="checkpoint") -> None:
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and left.equal(right), where
    elif isinstance(left, dict):
        assert list(left) == list(right), where
        for key in left:
            assert_same(left[key], right[key], f"{where}[{key!r}]")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for i, pair in enumerate(zip(left, right)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        assert left == right, where


STATE_KEYS = ("model_state_dict", "optimizer_state_dicts", "scheduler_state_dicts", "rng_state", "best_loss", "step", "epoch",
              "batch_in_epoch", "data_fingerprint", "mode", "loop")


def assert_same_run(left: Path, right: Path) -> None:
    a, b = t.load_checkpoint(left / "final.pt"), t.load_checkpoint(right / "final.pt")
    assert_same({key: a[key] for key in STATE_KEYS}, {key: b[key] for key in STATE_KEYS})
    assert a["metrics"]["smooth_loss"] == b["metrics"]["smooth_loss"]
    rows = metrics_without_times(left)
    assert rows == metrics_without_times(right)
    assert [int(row["step"]) for row in rows] == [3, 4, 6, 8, 9, 12, 14]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(options, directory) of the run that was never stopped, made once for each configuration."""
    made = {}

    def get(mode: str, grad_accum: int):
        if (mode, grad_accum) not in made:
            folder = tmp_path_factory.mktemp("reference")
            data = corpus_of(folder / "corpus.txt", windows=5 * 4 * grad_accum + 2)
            options = ["--data", str(data), *TINY, *SCHEDULE, *MODES[mode], "--grad-accum", str(grad_accum)]
            whole = train(folder / "ck", *options)
            assert whole.data.batches_per_epoch == 5 and whole.step == STEPS
            made[mode, grad_accum] = options, folder / "ck"
        return made[mode, grad_accum]

    return get


STOPS = [("batch", 0), ("batch", 1), ("batch", 5), ("batch", 6), ("batch", 8), ("evaluation", 8), ("batch", 13), ("batch", 14),
         ("evaluation", 14)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: f"{stop[0]}{stop[1]}")
def test_stopped_and_resumed_is_the_same_run(uninterrupted, tmp_path, mode, stop):
    options, reference = uninterrupted(mode, grad_accum=3)
    stopped = train(tmp_path, *options, "--workers", 2, stop=stop)
    assert stopped.saved[0] == "Emergency checkpoint" and stopped.step == stop[1]
    train(tmp_path, "--resume", stopped.saved[1])
    assert_same_run(tmp_path, reference)


def test_stopped_many_times_is_the_same_run(uninterrupted, tmp_path):
    options, reference = uninterrupted("geometric", 1)
    train(tmp_path, *options, stop=("batch", 0))
    for stop in [("batch", 2), ("batch", 4), ("evaluation", 4), ("evaluation", 4), ("batch", 5), ("batch", 11), ("evaluation", 12)]:
        stopped = train(tmp_path, "--resume", "latest", stop=stop)
        assert stopped.step == stop[1]
    train(tmp_path, "--resume", "latest")
    assert_same_run(tmp_path, reference)


def test_standard_loop_and_standard_controller_reach_the_same_bits(uninterrupted):
    (_, standard), (_, controller) = uninterrupted("standard", 1), uninterrupted("controller", 1)
    a, b = t.load_checkpoint(standard / "final.pt"), t.load_checkpoint(controller / "final.pt")
    for key in ("model_state_dict", "optimizer_state_dicts", "scheduler_state_dicts", "best_loss", "rng_state"):
        assert_same(a[key], b[key], key)


def test_resuming_from_an_older_periodic_checkpoint_cuts_the_rows_after_it(uninterrupted, tmp_path):
    options, reference = uninterrupted("standard", 1)
    stopped = train(tmp_path, *options, stop=("batch", 9))
    assert stopped.step == 9
    train(tmp_path, "--resume", tmp_path / "step_6.pt")
    assert_same_run(tmp_path, reference)


def test_resuming_in_another_directory_takes_the_metrics_along(uninterrupted, tmp_path):
    options, reference = uninterrupted("standard", 1)
    stopped = train(tmp_path / "old", *options, stop=("batch", 7))
    train(tmp_path / "new", "--resume", stopped.saved[1])
    assert_same_run(tmp_path / "new", reference)
    assert not (tmp_path / "old" / "final.pt").exists()


@pytest.mark.parametrize("how, resume", [
    (how, resume) for how in ("moved", "copied", "replaced") for resume in ("checkpoints/emergency_exit/emergency_step_7.pt", "latest")])
def test_a_run_that_was_moved_goes_on_where_it_is_now(uninterrupted, tmp_path, monkeypatch, how, resume):
    options, reference = uninterrupted("standard", 1)
    old, new = tmp_path / "old" / "checkpoints", tmp_path / "new" / "checkpoints"
    train(old, *options, stop=("batch", 7))
    shutil.copytree(old.parent, new.parent)
    if how != "copied":
        shutil.rmtree(old.parent)
    if how == "replaced":
        train(old, *options[:-2], "--seed", 7, stop=("batch", 9))  # another run in its old place
    there = {path: path.stat().st_mtime_ns for path in old.parent.rglob("*")}
    monkeypatch.chdir(new.parent)
    train(None, "--resume", resume)
    assert_same_run(new, reference)
    assert {path: path.stat().st_mtime_ns for path in old.parent.rglob("*")} == there


@pytest.mark.parametrize("step", [2, 7])  # before the first row, and after some
def test_a_checkpoint_among_those_of_another_run_leaves_its_rows_alone(uninterrupted, tmp_path, step):
    options, reference = uninterrupted("standard", 1)
    stopped = train(tmp_path / "mine", *options, stop=("batch", step))
    train(tmp_path / "other", *options, "--seed", 7)
    rows = (tmp_path / "other" / "metrics.csv").read_bytes()
    shutil.copy(stopped.saved[1], tmp_path / "other" / "mine.pt")
    train(None, "--resume", tmp_path / "other" / "mine.pt")
    assert (tmp_path / "other" / "metrics.csv").read_bytes() == rows
    (tmp_path / "other" / "metrics.csv").unlink()
    (tmp_path / "other" / "metrics_2.csv").rename(tmp_path / "other" / "metrics.csv")
    assert metrics_without_times(tmp_path / "other") == metrics_without_times(reference)


def test_a_fresh_start_beside_another_run_says_so(uninterrupted, tmp_path, capfd):
    options, reference = uninterrupted("standard", 1)
    train(tmp_path, *options, stop=("batch", 1))
    assert "another run" not in capfd.readouterr().out
    train(tmp_path, *options, stop=("batch", 2))
    assert f"{tmp_path} holds another run, with which --resume {tmp_path}/emergency_exit/emergency_step_1.pt goes on. This is a new one; its figures are in metrics_2.csv" in capfd.readouterr().out


def test_resume_reads_no_batch_before_the_one_it_goes_on_with(uninterrupted, tmp_path, monkeypatch):
    data = corpus_of(tmp_path / "long.txt", windows=1000)
    options = ["--data", str(data), *TINY, "--batch-size", "1", "--steps", "700", "--eval-every", "10000", "--layers", "1"]
    train(tmp_path / "ck", *options, stop=("batch", 695))
    read = []
    monkeypatch.setattr(t.ByteDataset, "__getitem__", lambda data, index, get=t.ByteDataset.__getitem__: (read.append(index), get(data, index))[1])
    train(tmp_path / "ck", "--resume", "latest")
    assert read[0] == 695 and len(read) == 5


def test_every_optimizer_and_scheduler_is_restored(uninterrupted, tmp_path):
    options, _ = uninterrupted("geometric", 1)
    stopped = train(tmp_path, *options, stop=("batch", 7))
    saved = t.load_checkpoint(stopped.saved[1])
    resumed = train(tmp_path, "--resume", stopped.saved[1], stop=("batch", 7))  # asked to leave before its first batch
    resumed = train(tmp_path, "--resume", stopped.saved[1], stop=("batch", 8))
    assert resumed.step == 8
    for name in ("rotation", "expert", "embedding"):
        assert saved["optimizer_state_dicts"][name]["state"]
        assert resumed.controller.schedulers[name].last_epoch == 8


def test_a_longer_run_goes_on_from_final_and_a_finished_one_says_so(uninterrupted, tmp_path):
    options, _ = uninterrupted("standard", 1)
    train(tmp_path, *options)
    again = run("--resume", "latest", "--checkpoint-dir", tmp_path)
    assert again.returncode == 0 and "Nothing left to do" in again.stdout
    longer = train(tmp_path, "--resume", tmp_path / "final.pt", "--steps", 18)
    assert longer.step == 18 and t.load_checkpoint(tmp_path / "final.pt")["step"] == 18


def test_other_data_is_named_as_such(uninterrupted, tmp_path):
    options, _ = uninterrupted("standard", 1)
    stopped = train(tmp_path, *options, stop=("batch", 7))
    longer = corpus_of(tmp_path / "longer.txt", windows=40)
    with pytest.raises(t.CheckpointError, match="longer.txt is not the data that the run of"):
        train(tmp_path, "--resume", stopped.saved[1], "--data", longer)


def test_fewer_steps_than_the_checkpoint_has_leave_nothing_to_do(uninterrupted, tmp_path):
    options, _ = uninterrupted("standard", 1)
    train(tmp_path, *options, stop=("batch", 9))
    before = sorted(tmp_path.rglob("*"))
    again = run("--resume", "latest", "--checkpoint-dir", tmp_path, "--steps", "7")
    assert again.returncode == 0 and "Nothing left to do: step 9 of 7" in again.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_killed_in_its_final_save_is_completed_by_resuming(uninterrupted, tmp_path):
    options, reference = uninterrupted("standard", 1)
    train(tmp_path, *options, "--save-every", 7)
    (tmp_path / "final.pt").unlink()
    train(tmp_path, "--resume", tmp_path / "step_14.pt")
    assert_same_run(tmp_path, reference)


def test_a_fresh_start_that_was_stopped_at_once_does_not_hide_a_trained_run(uninterrupted, tmp_path):
    options, _ = uninterrupted("standard", 1)
    first = train(tmp_path, *options, stop=("batch", 0))
    assert t.latest_checkpoint(tmp_path) == first.saved[1]  # the only one there is
    trained = train(tmp_path, *options, stop=("batch", 5))
    stopped = train(tmp_path, *options, stop=("batch", 0))
    assert stopped.step == 0 and t.latest_checkpoint(tmp_path) == trained.saved[1]


def test_epochs_end_the_run_and_the_schedule(uninterrupted, tmp_path):
    options, _ = uninterrupted("standard", 1)
    done = train(tmp_path, *options, "--epochs", 2)
    assert done.step == 10 and done.epoch == 2 and done.batch_in_epoch == 0
    assert done.controller.optimizers["adamw"].param_groups[0]["lr"] == pytest.approx(0.1 * 3e-3)


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=[] if mode == "geometric" else pytest.mark.campaign) for mode in MODES])
def test_q_typed_and_resumed_by_the_printed_command_in_real_processes(spawn, corpus, tmp_path, mode):
    options = ["--data", str(corpus), *TINY, "--steps", "150", "--eval-every", "40", *MODES[mode], "--workers", "1"]
    assert run(*options, "--checkpoint-dir", tmp_path / "whole").returncode == 0
    child = spawn(*options, "--checkpoint-dir", tmp_path / "stopped")
    child.expect("step [0-9]+/150")
    child.sendline("q")
    output = finish(child)
    assert child.exitstatus == 0
    assert 0 < t.load_checkpoint(saved_path(output))["step"] < 150
    child = spawn(command=["sh", "-c", output.rpartition("Resume with: ")[2].strip()])
    finish(child)
    assert child.exitstatus == 0
    a, b = (t.load_checkpoint(tmp_path / name / "final.pt") for name in ("whole", "stopped"))
    assert_same({key: a[key] for key in STATE_KEYS}, {key: b[key] for key in STATE_KEYS})
    assert metrics_without_times(tmp_path / "whole") == metrics_without_times(tmp_path / "stopped")


def test_the_run_is_the_same_with_and_without_a_person_asking_for_saves(uninterrupted, tmp_path):
    options, reference = uninterrupted("geometric", 1)
    train(tmp_path, *options, "--save-every", 1, "--keep", 2)
    assert_same_run(tmp_path, reference)
    assert sorted(path.name for path in tmp_path.glob("step_*.pt")) == ["step_13.pt", "step_14.pt"]
    assert t.load_checkpoint(tmp_path / "best.pt")["exit_reason"] == "best"




@pytest.mark.parametrize("mode", ["standard", "geometric"])
@pytest.mark.parametrize("bad", [4, 5, 6])
def test_a_nan_leaves_the_state_before_its_batch(uninterrupted, tmp_path, monkeypatch, mode, bad):
    options, reference = uninterrupted(mode, 1)
    expected = t.load_checkpoint(train(tmp_path / "expected", *options, stop=("batch", bad - 1)).saved[1])
    runs = []

    def poisoned(model, max_norm, original=t.clip_gradients):
        runs.append(model)
        if len(runs) == bad:
            model.head.weight.grad.fill_(float("nan"))
        original(model, max_norm)

    with monkeypatch.context() as patch:
        patch.setattr(t, "clip_gradients", poisoned)
        assert t.train(t.parse_options(["--checkpoint-dir", str(tmp_path / "ck"), "--no-keyboard", *options])) == 1
    assert len(runs) == bad
    saved = t.load_checkpoint(tmp_path / f"ck/emergency_exit/emergency_step_{bad - 1}.pt")
    assert saved["exit_reason"] == "exception_FloatingPointError"
    same = [key for key in STATE_KEYS if key != "best_loss"]  # the stop before the fourth step's evaluation had none
    assert_same({key: saved[key] for key in same}, {key: expected[key] for key in same})
    train(tmp_path / "ck", "--resume", "latest")
    assert_same_run(tmp_path / "ck", reference)
