"""A run that was stopped and resumed is, bit for bit, the run that was never stopped."""

import shutil
from pathlib import Path

import pytest
from helpers import (
    MODES,
    STATE_KEYS,
    TINY,
    Rows,
    assert_same,
    assert_same_run,
    column,
    corpus_of,
    finish,
    go,
    learning,
    metrics_without_times,
    refused,
    run,
    saved_path,
)

import train_graceful as t

CAMPAIGN = pytest.mark.campaign
STEPS = 30
# 24 batches an epoch and 2 an evaluation, every 8 steps; a row every 5: stops fall on every kind
# of boundary.
SCHEDULE = "--steps 30 --eval-every 8 --log-every 5 --save-every 12 --warmup-steps 3".split()
ROWS = [5, 8, 10, 15, 16, 20, 24, 25, 30]


def train(directory: Path | None, *args, stop=None) -> t.Run:
    return go(t.train, directory, *args, stop=stop, defaults=t.OPTIONS)


def final(directory: Path, name: str = "final.pt") -> dict:
    state = t.load_checkpoint(directory / name)
    return {key: state[key] for key in STATE_KEYS}


def contents(directory: Path) -> dict[Path, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != "run.lock")
    return {path: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(options, directory) of the run that was never stopped, made once for each configuration."""
    made = {}

    def get(mode: str = "standard", grad_accum: int = 1):
        if (mode, grad_accum) not in made:
            folder = tmp_path_factory.mktemp("reference")
            data = corpus_of(folder / "corpus.txt", windows=24 * 4 * grad_accum + 2, context=16)
            options = ["--data", str(data), *TINY, *SCHEDULE, *MODES[mode]]
            options += ["--grad-accum", str(grad_accum)]
            whole = train(folder / "ck", *options)
            assert whole.step == STEPS and whole.epoch == STEPS // 24 == 1
            assert column(folder / "ck", "step") == ROWS
            made[mode, grad_accum] = options, folder / "ck"
        return made[mode, grad_accum]

    return get


# ---- where it is stopped

STOPS = ["start 0", 1, 15, 16, "evaluation 16", 24, "evaluation 24", 25, 29, 30, "evaluation 30"]
CASES = [
    pytest.param(mode, stop, marks=[CAMPAIGN] * (mode != "geometric" and number % 3 > 0))
    for mode in MODES
    for number, stop in enumerate(STOPS)
]


@pytest.mark.parametrize("mode, stop", CASES)
def test_stopped_and_resumed_is_the_same_run(uninterrupted, tmp_path, mode, stop):
    options, reference = uninterrupted(mode, grad_accum=2)
    stopped = train(tmp_path, *options, "--workers", 2, stop=stop)
    step, state = int(str(stop).split()[-1]), t.load_checkpoint(stopped.saved)
    assert stopped.saved.name == f"emergency_step_{step}.pt" and state["step"] == step
    assert "evaluation" not in str(stop) or state["evaluation"]["step"] < step
    train(tmp_path, "--resume", stopped.saved)
    assert_same_run(tmp_path, reference)


def test_stopped_many_times_is_the_same_run(uninterrupted, tmp_path):
    options, reference = uninterrupted("geometric")
    train(tmp_path, *options, stop="start 0")
    for stop in [2, 8, "start 8", 9, 13, "evaluation 16", "evaluation 24", "start 24"]:
        stopped = train(tmp_path, "--resume", "latest", stop=stop)
        assert stopped.step == int(str(stop).split()[-1])
    train(tmp_path, "--resume", "latest")
    assert_same_run(tmp_path, reference)


def test_standard_loop_and_standard_controller_reach_the_same_bits(uninterrupted):
    assert_same_run(uninterrupted("standard")[1], uninterrupted("controller")[1])


def test_the_run_is_the_same_with_and_without_saves(uninterrupted, tmp_path):
    options, reference = uninterrupted("geometric")
    train(tmp_path, *options, "--save-every", 1, "--keep", 2)
    assert_same_run(tmp_path, reference)
    assert {path.name for path in tmp_path.glob("step_*.pt")} == {"step_29.pt", "step_30.pt"}
    assert t.load_checkpoint(tmp_path / "best.pt")["exit_reason"] == "best"


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


def test_resume_reads_no_batch_before_the_one_it_goes_on_with(tmp_path):
    read = []

    class Noted(Rows):
        def __getitem__(self, index: int):
            read.append(index)
            return super().__getitem__(index)

    noted = learning(data=lambda run: run.data(Noted(1000)), evaluate=None)
    options = {"batch_size": 2, "steps": 700}
    go(noted, tmp_path / "whole", **options)
    assert len(read) == 1400 and sorted(read[:1000]) == list(range(1000))
    go(noted, tmp_path / "parts", stop=695, **options)
    assert read[1400:] == read[:1390]
    go(noted, tmp_path / "parts", "--resume", "latest", **options)
    assert read[1400:] == read[:1400]


# ---- going back


def test_from_an_older_checkpoint_it_goes_on_there_and_rows_are_there_once(uninterrupted, tmp_path):
    options, reference = uninterrupted()
    furthest = train(tmp_path, *options, stop=17).saved
    assert column(tmp_path, "step") == [5, 8, 10, 15, 16]
    assert t.latest_checkpoint(tmp_path) == furthest
    older = tmp_path / "step_12.pt"
    assert train(tmp_path, "--resume", older, stop="start 12").step == 12
    assert column(tmp_path, "step") == [5, 8, 10]
    # What was saved after going back is the latest one.
    back = train(tmp_path, "--resume", older, stop=13).saved
    assert t.latest_checkpoint(tmp_path) == back
    cut_short = train(tmp_path, "--resume", "latest", stop="evaluation 16").saved
    # As if the first of these sessions had died before it saved: it is evaluated again.
    for path in older, cut_short, cut_short:
        train(tmp_path, "--resume", path)
        assert_same_run(tmp_path, reference)


# ---- another place


def test_resuming_in_another_directory_leaves_the_old_one_alone(uninterrupted, tmp_path):
    options, reference = uninterrupted()
    path = train(tmp_path / "old", *options, stop=7).saved
    before = contents(tmp_path / "old")
    train(tmp_path / "new", "--resume", path)
    assert_same(final(tmp_path / "new"), final(reference))
    rows = metrics_without_times(tmp_path / "new")
    assert rows == metrics_without_times(reference)[1:], "those before lie beside its checkpoints"
    assert contents(tmp_path / "old") == before


@pytest.mark.parametrize("resume", ["checkpoints/emergency_exit/emergency_step_7.pt", "latest"])
@pytest.mark.parametrize("how", ["moved", "copied", "replaced", "linked"])
def test_a_run_that_was_moved_goes_on_where_it_is_now(
    uninterrupted, tmp_path, monkeypatch, how, resume
):
    options, reference = uninterrupted()
    old, new = tmp_path / "old" / "checkpoints", tmp_path / "new" / "checkpoints"
    train(old, *options, stop=7)
    if how == "linked":
        new.parent.mkdir()
        new.symlink_to(old)
    else:
        shutil.copytree(old.parent, new.parent)
    if how in ("moved", "replaced"):
        shutil.rmtree(old.parent)
    if how == "replaced":
        # Another run in its old place.
        train(old, *options, "--seed", 7, stop=9)
    there = contents(old.parent)
    monkeypatch.chdir(new.parent)
    train(None, "--resume", resume)
    assert_same_run(old if how == "linked" else new, reference)
    assert how == "linked" or contents(old.parent) == there


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_a_linked_checkpoint_goes_on_where_it_really_lies(
    uninterrupted, tmp_path, monkeypatch, linked
):
    options, reference = uninterrupted()
    path = train(tmp_path / "real", *options, stop=7).saved
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Path("link").symlink_to(path if linked == "file" else path.parent)
    train(None, "--resume", "link" if linked == "file" else f"link/{path.name}")
    assert_same_run(tmp_path / "real", reference)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["link"]


# Before the first row, and after some.
@pytest.mark.parametrize("step", [2, 7])
def test_a_checkpoint_among_those_of_another_run_leaves_its_rows_alone(
    uninterrupted, tmp_path, step
):
    options, reference = uninterrupted()
    path, other = train(tmp_path / "mine", *options, stop=step).saved, tmp_path / "other"
    train(other, *options, "--seed", 7)
    before = contents(other)
    shutil.copy(path, other / "mine.pt")
    train(None, "--resume", other / "mine.pt")
    assert contents(other).items() >= before.items()
    assert_same(final(other, "final_2.pt"), final(reference))
    # Those before lie beside the run's other checkpoints, and nobody has copied them.
    rows = metrics_without_times(reference)[step > 5 :]
    assert metrics_without_times(other, "metrics_2.csv") == rows


def test_other_data_is_refused_and_the_same_may_lie_elsewhere(uninterrupted, tmp_path):
    options, reference = uninterrupted()
    data, ck, same = tmp_path / "data", tmp_path / "ck", tmp_path / "same"
    data.mkdir()
    for name in "abcde":
        corpus_of(data / f"{name}.txt", 8, 16)
    path = train(ck, "--data", str(data), *options[2:], stop=7).saved
    (data / "c.txt").write_bytes((data / "c.txt").read_bytes().replace(b"squared", b"SQUARED"))
    before = contents(ck)
    for other in ([], ["--data", corpus_of(tmp_path / "other.txt", 40, 16)]):
        message = refused("--resume", path, *other)
        assert f"the data is not what the run of {path} was trained on" in message
    assert contents(ck) == before
    path = train(same, *options, stop=7).saved
    train(None, "--resume", path, "--data", shutil.copy(options[1], tmp_path / "renamed.txt"))
    assert_same_run(same, reference)


# ---- the end


@pytest.mark.parametrize("arguments, line", [([], "30 of 30"), (["--steps", 7], "30 of 7")])
def test_a_finished_run_says_that_nothing_is_left_to_do_and_changes_nothing(
    uninterrupted, tmp_path, arguments, line
):
    train(tmp_path, *uninterrupted()[0])
    before = contents(tmp_path)
    again = run("--resume", "latest", "--checkpoint-dir", tmp_path, *arguments)
    assert again.returncode == 0 and again.stderr == "" and "Training started" not in again.stdout
    assert f"✅ Nothing left to do: step {line}.\n" in again.stdout
    assert contents(tmp_path) == before


@pytest.mark.parametrize("mode", ["standard", "geometric"])
def test_a_longer_run_goes_on_from_final(uninterrupted, tmp_path, mode):
    train(tmp_path, *uninterrupted(mode)[0])
    finished = t.load_checkpoint(tmp_path / "final.pt")
    assert train(tmp_path, "--resume", tmp_path / "final.pt", "--steps", 37).step == 37
    longer = t.load_checkpoint(tmp_path / "final.pt")
    assert longer["step"] == 37 and longer["run_id"] == finished["run_id"]
    assert column(tmp_path, "step") == [*ROWS, 32, 35, 37]


def test_a_run_killed_in_its_final_save_is_completed_by_resuming(uninterrupted, tmp_path):
    options, reference = uninterrupted()
    train(tmp_path, *options, "--save-every", 15)
    (tmp_path / "final.pt").unlink()
    train(tmp_path, "--resume", tmp_path / "step_30.pt")
    assert_same_run(tmp_path, reference)


def test_epochs_end_the_run_and_the_schedule(uninterrupted, tmp_path):
    done = train(tmp_path, *uninterrupted()[0], "--epochs", 1)
    assert done.step == done.total_steps == 24 and done.epoch == 1
    optimizer = t.load_checkpoint(tmp_path / "final.pt")["optimizer_state_dicts"]["adamw"]
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(0.1 * 3e-3)
