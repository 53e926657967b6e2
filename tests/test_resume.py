"""A run that was stopped and resumed is, bit for bit, the run that was never stopped."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import (
    MODES,
    STATE_KEYS,
    TINY,
    ask_to_leave,
    assert_same,
    assert_same_run,
    finish,
    metrics_without_times,
    refused,
    run,
    saved_path,
    session,
)

import train_graceful as t

CAMPAIGN = pytest.mark.campaign
STEPS = 30
# 24 batches an epoch and 2 an evaluation, every 8 steps; a row every 5: stops fall on every kind of
# boundary.
SCHEDULE = ["--steps", str(STEPS), "--eval-every", "8", "--log-every", "5", "--save-every", "12"]
SCHEDULE += ["--warmup-steps", "3"]
ROWS = [5, 8, 10, 15, 16, 20, 24, 25, 30]


def corpus_of(path: Path, windows: int) -> Path:
    """A text of which so many windows of 16 bytes are training data."""
    text = b"".join(b"%d squared is %d; " % (n, n * n) for n in range(2000))
    path.write_bytes(text[: int(windows * 16 / 0.95) + 20])
    return path


def train(directory: Path | None, *args, stop=None) -> t.Run:
    """One session of the program in this process.

    stop is when SIGTERM comes: ("start", step) once the loop has begun, before its first batch;
    ("batch", step) in the batch that makes it so many; ("evaluation", step) in that evaluation.
    """
    runs: list[t.Run] = []

    def stopped(run: t.Run) -> None:
        runs.append(run)
        original, say = run.batches, run.screen.say

        def stopped_say(text):
            say(text)
            if "Training started" in text and stop == ("start", run.step):
                ask_to_leave(run)

        def batches(evaluate, **keywords):
            def stopped_evaluate(batch):
                if stop == ("evaluation", run.step):
                    ask_to_leave(run)
                return evaluate(batch)

            for batch in original(stopped_evaluate, **keywords):
                if stop == ("batch", run.step + 1):
                    ask_to_leave(run)
                yield batch

        run.batches, run.screen.say = batches, stopped_say
        t.train(run)

    where = [] if directory is None else ["--checkpoint-dir", directory]
    code = session(*where, *args, train=stopped, **t.OPTIONS)
    assert code == (0 if stop is None else 143)
    return runs[0]


def steps_of_rows(directory: Path, name="metrics.csv") -> list[int]:
    return [int(row["step"]) for row in metrics_without_times(directory, name)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(options, directory) of the run that was never stopped, made once for each configuration."""
    made = {}

    def get(mode: str, grad_accum: int = 1):
        if (mode, grad_accum) not in made:
            folder = tmp_path_factory.mktemp("reference")
            data = corpus_of(folder / "corpus.txt", windows=24 * 4 * grad_accum + 2)
            options = ["--data", str(data), *TINY, *SCHEDULE, *MODES[mode]]
            options += ["--grad-accum", str(grad_accum)]
            whole = train(folder / "ck", *options)
            assert whole.step == STEPS and whole.epoch == STEPS // 24 == 1
            assert steps_of_rows(folder / "ck") == ROWS
            made[mode, grad_accum] = options, folder / "ck"
        return made[mode, grad_accum]

    return get


STOPS = [
    ("start", 0),
    ("batch", 1),
    ("batch", 15),
    ("batch", 16),
    ("evaluation", 16),
    ("batch", 24),
    ("evaluation", 24),
    ("batch", 25),
    ("batch", 29),
    ("batch", 30),
    ("evaluation", 30),
]


@pytest.mark.parametrize(
    "mode, stop",
    [
        pytest.param(
            mode,
            stop,
            id=f"{mode}-{stop[0]}{stop[1]}",
            marks=[CAMPAIGN] * (mode != "geometric" and number % 3 > 0),
        )
        for mode in MODES
        for number, stop in enumerate(STOPS)
    ],
)
def test_stopped_and_resumed_is_the_same_run(uninterrupted, tmp_path, mode, stop):
    options, reference = uninterrupted(mode, grad_accum=2)
    stopped = train(tmp_path, *options, "--workers", 2, stop=stop)
    path = stopped.saved
    assert not stop[0] == "evaluation" or t.load_checkpoint(path)["evaluation"]["step"] < stop[1]
    assert path.name == f"emergency_step_{stop[1]}.pt"
    assert t.load_checkpoint(path)["step"] == stopped.step == stop[1]
    train(tmp_path, "--resume", path)
    assert_same_run(tmp_path, reference)


def test_stopped_many_times_is_the_same_run(uninterrupted, tmp_path):
    options, reference = uninterrupted("geometric")
    train(tmp_path, *options, stop=("start", 0))
    stops = [("batch", 2), ("batch", 8), ("start", 8), ("batch", 9), ("batch", 13)]
    for stop in [*stops, ("evaluation", 16), ("evaluation", 24), ("start", 24)]:
        stopped = train(tmp_path, "--resume", "latest", stop=stop)
        assert stopped.step == stop[1]
    train(tmp_path, "--resume", "latest")
    assert_same_run(tmp_path, reference)


def test_standard_loop_and_standard_controller_reach_the_same_bits(uninterrupted):
    (_, standard), (_, controller) = uninterrupted("standard"), uninterrupted("controller")
    assert_same_run(standard, controller)


def test_resuming_from_an_older_checkpoint_cuts_the_rows_after_it(uninterrupted, tmp_path):
    options, reference = uninterrupted("standard")
    train(tmp_path, *options, stop=("batch", 17))
    assert steps_of_rows(tmp_path) == [5, 8, 10, 15, 16]
    resumed = train(tmp_path, "--resume", tmp_path / "step_12.pt", stop=("start", 12))
    assert resumed.step == 12 and steps_of_rows(tmp_path) == [5, 8, 10]
    train(tmp_path, "--resume", tmp_path / "step_12.pt")
    assert_same_run(tmp_path, reference)


def test_the_row_of_an_evaluation_that_was_cut_short_is_there_once(uninterrupted, tmp_path):
    """Also if the session that wrote it has died before it saved: it is evaluated, and written, again."""
    options, reference = uninterrupted("standard")
    path = train(tmp_path, *options, stop=("evaluation", 16)).saved
    train(tmp_path, "--resume", path)
    train(tmp_path, "--resume", path)
    assert_same_run(tmp_path, reference)


def test_latest_prefers_what_was_saved_after_going_back(uninterrupted, tmp_path):
    options, reference = uninterrupted("standard")
    furthest = train(tmp_path, *options, stop=("batch", 17)).saved
    assert t.latest_checkpoint(tmp_path) == furthest
    back = train(tmp_path, "--resume", tmp_path / "step_12.pt", stop=("batch", 13)).saved
    assert t.latest_checkpoint(tmp_path) == back
    train(tmp_path, "--resume", "latest")
    assert_same_run(tmp_path, reference)


def test_latest_is_the_furthest_of_the_run_that_saved_last_whatever_the_files_times(
    uninterrupted, tmp_path
):
    options, _ = uninterrupted("standard")
    train(tmp_path, *options, stop=("batch", 13))
    newer = train(tmp_path, *options, "--seed", 7, "--save-every", 2, stop=("batch", 9)).saved
    files = sorted(tmp_path.rglob("*.pt"))
    assert len(files) > 6
    for order in (files, files[::-1]):
        for hours, file in enumerate(order):
            os.utime(file, (3600 * hours, 3600 * hours))
        assert t.latest_checkpoint(tmp_path) == newer


def test_resuming_in_another_directory_leaves_the_old_one_alone(uninterrupted, tmp_path):
    options, reference = uninterrupted("standard")
    stopped = train(tmp_path / "old", *options, stop=("batch", 7))
    before = {path: path.read_bytes() for path in (tmp_path / "old").rglob("*.*")}
    train(tmp_path / "new", "--resume", stopped.saved, "--checkpoint-dir", tmp_path / "new")
    final = t.load_checkpoint(tmp_path / "new" / "final.pt")
    expected = t.load_checkpoint(reference / "final.pt")
    assert_same({k: final[k] for k in STATE_KEYS}, {k: expected[k] for k in STATE_KEYS})
    rows = metrics_without_times(tmp_path / "new")
    assert rows == metrics_without_times(reference)[1:], "those before lie beside its checkpoints"
    assert {path: path.read_bytes() for path in (tmp_path / "old").rglob("*.*")} == before


@pytest.mark.parametrize("resume", ["checkpoints/emergency_exit/emergency_step_7.pt", "latest"])
@pytest.mark.parametrize("how", ["moved", "copied", "replaced"])
def test_a_run_that_was_moved_goes_on_where_it_is_now(
    uninterrupted, tmp_path, monkeypatch, how, resume
):
    options, reference = uninterrupted("standard")
    old, new = tmp_path / "old" / "checkpoints", tmp_path / "new" / "checkpoints"
    train(old, *options, stop=("batch", 7))
    shutil.copytree(old.parent, new.parent)
    if how != "copied":
        shutil.rmtree(old.parent)
    if how == "replaced":
        # Another run in its old place.
        train(old, *options[:-2], "--seed", 7, stop=("batch", 9))
    there = {path: path.stat().st_mtime_ns for path in old.parent.rglob("*")}
    monkeypatch.chdir(new.parent)
    train(None, "--resume", resume)
    assert_same_run(new, reference)
    assert {path: path.stat().st_mtime_ns for path in old.parent.rglob("*")} == there


@pytest.mark.parametrize("linked", ["checkpoint", "emergency_exit", "checkpoints"])
def test_a_linked_checkpoint_goes_on_where_it_really_lies(
    uninterrupted, tmp_path, monkeypatch, linked
):
    options, reference = uninterrupted("standard")
    path = train(tmp_path / "real", *options, stop=("batch", 7)).saved
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    target, resume = {
        "checkpoint": (path, "link"),
        "emergency_exit": (path.parent, f"link/{path.name}"),
        "checkpoints": (tmp_path / "real", f"link/emergency_exit/{path.name}"),
    }[linked]
    Path("link").symlink_to(target)
    train(None, "--resume", resume)
    assert_same_run(tmp_path / "real", reference)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["link"]


def test_a_linked_directory_of_checkpoints_has_a_latest(uninterrupted, tmp_path, monkeypatch):
    options, reference = uninterrupted("standard")
    train(tmp_path / "real", *options, stop=("batch", 7))
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").symlink_to(tmp_path / "real")
    train(None, "--resume", "latest")
    assert_same_run(tmp_path / "real", reference)


# Before the first row, and after some.
@pytest.mark.parametrize("step", [2, 7])
def test_a_checkpoint_among_those_of_another_run_leaves_its_rows_alone(
    uninterrupted, tmp_path, step
):
    options, reference = uninterrupted("standard")
    stopped = train(tmp_path / "mine", *options, stop=("batch", step))
    other = tmp_path / "other"
    train(other, *options, "--seed", 7)
    before = {path: path.read_bytes() for path in other.rglob("*.*") if path.name != "run.lock"}
    shutil.copy(stopped.saved, other / "mine.pt")
    train(None, "--resume", other / "mine.pt")
    assert {path: path.read_bytes() for path in before} == before
    final = t.load_checkpoint(other / "final_2.pt")
    expected = t.load_checkpoint(reference / "final.pt")
    assert_same({k: final[k] for k in STATE_KEYS}, {k: expected[k] for k in STATE_KEYS})
    rows = metrics_without_times(reference)
    if step == 2:
        assert metrics_without_times(other, "metrics_2.csv") == rows
    else:
        # Those before lie beside the run's other checkpoints, and nobody has copied them.
        assert metrics_without_times(other, "metrics_2.csv") == rows[1:]


def test_a_fresh_start_beside_another_run_has_rows_of_its_own(uninterrupted, tmp_path):
    options, _ = uninterrupted("standard")
    train(tmp_path, *options, stop=("batch", 5))
    train(tmp_path, *options, stop=("batch", 6))
    assert steps_of_rows(tmp_path) == [5] and steps_of_rows(tmp_path, "metrics_2.csv") == [5]


class Noted(torch.utils.data.Dataset):
    """Samples are their indices; notes which ones were read."""

    def __init__(self, length: int) -> None:
        self.length, self.read = length, []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        self.read.append(index)
        return torch.tensor([float(index)])


def test_resume_reads_no_batch_before_the_one_it_goes_on_with(tmp_path):
    def one_session(*args, stop=None):
        data = Noted(1000)

        def train(run):
            run.data(data)
            model = run.model(torch.nn.Linear(1, 1))
            optimizer = run.keep(optimizer=torch.optim.SGD(model.parameters(), 1e-9))
            for batch in run.batches():
                model(batch).mean().backward()
                optimizer.step()
                if run.step + 1 == stop:
                    ask_to_leave(run)

        where = ["--checkpoint-dir", tmp_path / "ck", *args]
        assert session(*where, train=train, batch_size=2, steps=700) == (143 if stop else 0)
        return data.read

    whole = one_session()
    assert len(whole) == 1400 and sorted(whole[:1000]) == list(range(1000))
    assert one_session(stop=695) == whole[:1390]
    assert one_session("--resume", "latest") == whole[1390:]


@pytest.mark.parametrize("mode", ["standard", "geometric"])
def test_every_optimizer_and_scheduler_is_restored(uninterrupted, tmp_path, mode):
    options, _ = uninterrupted(mode)
    path = train(tmp_path, *options, stop=("batch", 7)).saved
    saved = t.load_checkpoint(path)
    names = ["rotation", "expert", "embedding"] if mode == "geometric" else ["adamw"]
    assert list(saved["optimizer_state_dicts"]) == list(saved["scheduler_state_dicts"]) == names
    assert all(one["state"] for one in saved["optimizer_state_dicts"].values())
    # Asked to leave before its first batch, it saves what it has restored.
    again = t.load_checkpoint(train(tmp_path, "--resume", path, stop=("start", 7)).saved)
    assert again["metrics"]["sessions"] == 2
    assert_same({k: again[k] for k in STATE_KEYS}, {k: saved[k] for k in STATE_KEYS})
    last = t.load_checkpoint(train(tmp_path, "--resume", path, stop=("batch", 8)).saved)
    assert [one["last_epoch"] for one in last["scheduler_state_dicts"].values()] == [8] * len(names)


def test_a_finished_run_says_that_nothing_is_left_to_do_and_changes_nothing(
    uninterrupted, tmp_path
):
    options, _ = uninterrupted("standard")
    train(tmp_path, *options)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = run("--resume", "latest", "--checkpoint-dir", tmp_path)
    assert again.returncode == 0 and again.stderr == ""
    line = "✅ Nothing left to do: step 30 of 30.\n"
    assert line in again.stdout and "Training started" not in again.stdout
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("mode", ["standard", "geometric"])
def test_a_longer_run_goes_on_from_final(uninterrupted, tmp_path, mode):
    options, _ = uninterrupted(mode)
    train(tmp_path, *options)
    finished = t.load_checkpoint(tmp_path / "final.pt")
    longer = train(tmp_path, "--resume", tmp_path / "final.pt", "--steps", 37)
    assert longer.step == 37
    final = t.load_checkpoint(tmp_path / "final.pt")
    assert final["step"] == 37 and final["run_id"] == finished["run_id"]
    assert steps_of_rows(tmp_path) == [*ROWS, 32, 35, 37]


def test_more_steps_than_a_scheduler_can_take_are_refused(tmp_path, capfd):
    def train(run):
        run.data(Noted(20))
        model = run.model(torch.nn.Linear(1, 1))
        optimizer = run.keep(optimizer=torch.optim.SGD(model.parameters(), 1e-9))
        one_cycle = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 1e-9, total_steps=run.total_steps
        )
        run.keep(scheduler=one_cycle)
        for batch in run.batches():
            model(batch).mean().backward()
            optimizer.step()
            one_cycle.step()

    where = ["--checkpoint-dir", tmp_path]
    assert session(*where, train=train, steps=5) == 0
    assert session(*where, "--resume", "latest", "--steps", 9, train=train, steps=5) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "(total_steps: 5 there, 9 here)" in error
    assert t.load_checkpoint(tmp_path / "final.pt")["step"] == 5


def test_other_data_is_refused(uninterrupted, tmp_path):
    options, _ = uninterrupted("standard")
    data, ck = tmp_path / "data", tmp_path / "ck"
    data.mkdir()
    for name in "abcde":
        corpus_of(data / f"{name}.txt", windows=8)
    path = train(ck, "--data", str(data), *options[2:], stop=("batch", 7)).saved
    (data / "c.txt").write_bytes((data / "c.txt").read_bytes().replace(b"squared", b"SQUARED"))
    before = sorted(tmp_path.rglob("*"))
    for other in ([], ["--data", corpus_of(tmp_path / "other.txt", windows=40)]):
        message = refused("--resume", path, *other)
        assert f"the data is not what the run of {path} was trained on" in message
    assert sorted({*tmp_path.rglob("*")} - {tmp_path / "other.txt"}) == before


def test_the_same_data_may_lie_elsewhere(uninterrupted, tmp_path):
    options, reference = uninterrupted("standard")
    copied = shutil.copy(options[1], tmp_path / "renamed.txt")
    path = train(tmp_path / "ck", *options, stop=("batch", 7)).saved
    train(None, "--resume", path, "--data", copied)
    ours, theirs = (t.load_checkpoint(ck / "final.pt") for ck in (tmp_path / "ck", reference))
    assert_same(ours["model_state_dict"], theirs["model_state_dict"])
    assert metrics_without_times(tmp_path / "ck") == metrics_without_times(reference)


def test_fewer_steps_than_the_checkpoint_has_leave_nothing_to_do(uninterrupted, tmp_path):
    options, _ = uninterrupted("standard")
    train(tmp_path, *options, stop=("batch", 9))
    before = sorted(tmp_path.rglob("*"))
    again = run("--resume", "latest", "--checkpoint-dir", tmp_path, "--steps", "7")
    assert again.returncode == 0 and "Nothing left to do: step 9 of 7" in again.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_killed_in_its_final_save_is_completed_by_resuming(uninterrupted, tmp_path):
    options, reference = uninterrupted("standard")
    train(tmp_path, *options, "--save-every", 15)
    (tmp_path / "final.pt").unlink()
    train(tmp_path, "--resume", tmp_path / "step_30.pt")
    assert_same_run(tmp_path, reference)


def test_a_fresh_start_that_was_stopped_at_once_does_not_hide_a_trained_run(
    uninterrupted, tmp_path
):
    options, _ = uninterrupted("standard")
    first = train(tmp_path, *options, stop=("start", 0))
    # The only one there is.
    assert t.latest_checkpoint(tmp_path) == first.saved
    trained = train(tmp_path, *options, stop=("batch", 5))
    stopped = train(tmp_path, *options, stop=("start", 0))
    assert stopped.step == 0 and t.latest_checkpoint(tmp_path) == trained.saved


def test_epochs_end_the_run_and_the_schedule(uninterrupted, tmp_path):
    options, _ = uninterrupted("standard")
    done = train(tmp_path, *options, "--epochs", 1)
    assert done.step == done.total_steps == 24 and done.epoch == 1
    optimizer = t.load_checkpoint(tmp_path / "final.pt")["optimizer_state_dicts"]["adamw"]
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(0.1 * 3e-3)


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=[] if mode == "geometric" else CAMPAIGN) for mode in MODES]
)
def test_q_typed_and_resumed_by_the_printed_command_in_real_processes(
    spawn, corpus, tmp_path, mode
):
    options = ["--data", str(corpus), *TINY, "--steps", "60", "--eval-every", "40", *MODES[mode]]
    options += ["--workers", "1"]
    assert run(*options, "--checkpoint-dir", tmp_path / "whole").returncode == 0
    child = spawn(*options, "--checkpoint-dir", tmp_path / "stopped")
    child.expect("step [0-9]+/60")
    child.sendline("q")
    output = finish(child)
    assert child.exitstatus == 0
    assert 0 < t.load_checkpoint(saved_path(output))["step"] < 60
    child = spawn(command=["sh", "-c", output.rpartition("Resume with: ")[2].strip()])
    finish(child)
    assert child.exitstatus == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_the_run_is_the_same_with_and_without_saves(uninterrupted, tmp_path):
    options, reference = uninterrupted("geometric")
    train(tmp_path, *options, "--save-every", 1, "--keep", 2)
    assert_same_run(tmp_path, reference)
    periodic = sorted(path.name for path in tmp_path.glob("step_*.pt"))
    assert periodic == ["step_29.pt", "step_30.pt"]
    assert t.load_checkpoint(tmp_path / "best.pt")["exit_reason"] == "best"


@pytest.mark.parametrize("mode", ["standard", "geometric"])
@pytest.mark.parametrize("bad", [8, 9, 10])
def test_a_nan_leaves_the_state_before_its_batch(uninterrupted, tmp_path, mode, bad):
    options, reference = uninterrupted(mode)
    stopped = train(tmp_path / "expected", *options, stop=("batch", bad - 1))
    expected = t.load_checkpoint(stopped.saved)

    def poisoned(run):
        original = run.clip_gradients

        def clip_gradients(max_norm):
            if run.step == bad - 1:
                run.module.head.weight.grad.fill_(float("nan"))
            return original(max_norm)

        run.clip_gradients = clip_gradients
        t.train(run)

    ck = tmp_path / "ck"
    assert session("--checkpoint-dir", ck, *options, train=poisoned, **t.OPTIONS) == 1
    saved = t.load_checkpoint(ck / f"emergency_exit/emergency_step_{bad - 1}.pt")
    assert saved["exit_reason"] == "exception_FloatingPointError"
    # A stop in the eighth batch comes before its evaluation.
    same = [key for key in STATE_KEYS if bad != 9 or key not in ("best", "evaluation")]
    assert_same({key: saved[key] for key in same}, {key: expected[key] for key in same})
    train(ck, "--resume", "latest")
    assert_same_run(ck, reference)
