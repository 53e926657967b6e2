"""A run that was stopped and resumed is, bit for bit, the run that was never stopped."""

import shutil
from pathlib import Path

import helpers as h
import pytest

import train_graceful as t

CAMPAIGN = pytest.mark.campaign
STEPS = 30
# 24 batches an epoch and 2 an evaluation, every 8 steps; a row every 5: stops fall on every kind
# of boundary.
SCHEDULE = "--steps 30 --eval-every 8 --log-every 5 --save-every 12 --warmup-steps 3".split()
ROWS = [5, 8, 10, 15, 16, 20, 24, 25, 30]


def train(directory: Path | None, *args, stop=None) -> t.Run:
    return h.go(t.train, directory, *args, stop=stop, defaults=t.OPTIONS)


def contents(directory: Path) -> dict[Path, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != "run.lock")
    return {path: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """(options, directory) of the run that was never stopped, made once for each configuration."""
    made = {}

    def get(mode: str = "standard", grad_accum: int = 1):
        if (mode, grad_accum) not in made:
            folder = tmp_path_factory.mktemp("reference")
            data = h.corpus_of(folder / "corpus.txt", windows=24 * 4 * grad_accum + 2, context=16)
            options = ["--data", str(data), *h.TINY, *SCHEDULE, *h.MODES[mode]]
            options += ["--grad-accum", str(grad_accum)]
            whole = train(folder / "ck", *options)
            assert whole.step == STEPS and whole.epoch == STEPS // 24 == 1
            assert h.column(folder / "ck", "step") == ROWS
            made[mode, grad_accum] = options, folder / "ck"
        return made[mode, grad_accum]

    return get


# ---- where it is stopped

STOPS = ["start 0", 1, 15, 16, "evaluation 16", 24, "evaluation 24", 25, 29, 30, "evaluation 30"]
CASES = [
    pytest.param(mode, stop, marks=[CAMPAIGN] * (mode != "geometric" and number % 3 > 0))
    for mode in h.MODES
    for number, stop in enumerate(STOPS)
]


@pytest.mark.parametrize("mode, stop", CASES)
def test_stopped_and_resumed_is_the_same_run(straight, tmp_path, mode, stop):
    options, reference = straight(mode, grad_accum=2)
    stopped = train(tmp_path, *options, "--workers", 2, stop=stop)
    step, state = int(str(stop).split()[-1]), t.load_checkpoint(stopped.saved)
    assert stopped.saved.name == f"emergency_step_{step}.pt" and state["step"] == step
    assert "evaluation" not in str(stop) or state["evaluation"]["step"] < step
    train(tmp_path, "--resume", stopped.saved)
    h.assert_same_run(tmp_path, reference)


def test_standard_loop_and_standard_controller_reach_the_same_bits(straight):
    h.assert_same_run(straight("standard")[1], straight("controller")[1])


def test_the_run_is_the_same_however_often_it_is_saved(straight, tmp_path):
    options, reference = straight("geometric")
    train(tmp_path, *options, "--save-every", 1, "--keep", 2)
    h.assert_same_run(tmp_path, reference)
    assert {path.name for path in tmp_path.glob("step_*.pt")} == {"step_29.pt", "step_30.pt"}
    assert t.load_checkpoint(tmp_path / "best.pt")["exit_reason"] == "best"


def test_q_typed_and_resumed_by_the_printed_command_in_real_processes(spawn, options, tmp_path):
    options += ["--steps", "60", "--eval-every", "40", "--mode", "geometric", "--workers", "1"]
    assert h.run(*options, "--checkpoint-dir", tmp_path / "whole").returncode == 0
    child = spawn(*options)
    child.expect("step [0-9]+/60")
    child.sendline("q")
    output = h.finish(child)
    assert child.exitstatus == 0
    assert 0 < t.load_checkpoint(h.saved_path(output))["step"] < 60
    child = spawn(command=["sh", "-c", output.rpartition("Resume with: ")[2].strip()])
    h.finish(child)
    assert child.exitstatus == 0
    h.assert_same_run(tmp_path / "whole", tmp_path / "ck")


def test_resume_reads_no_batch_before_the_one_it_goes_on_with(tmp_path):
    read = []

    class Noted(h.Rows):
        def __getitem__(self, index: int):
            read.append(index)
            return super().__getitem__(index)

    noted = h.learning(data=lambda run: run.data(Noted(1000)), evaluate=None)
    options = {"batch_size": 2, "steps": 700}
    h.go(noted, tmp_path, stop=695, **options)
    assert len(read) == 1390 and sorted(read[:1000]) == list(range(1000))
    h.go(noted, tmp_path, "--resume", "latest", **options)
    assert len(read) == 1400 and len(set(read[1000:])) == 400


# ---- going back


def test_from_an_older_checkpoint_it_goes_on_there_and_rows_are_there_once(straight, tmp_path):
    options, reference = straight()
    furthest = train(tmp_path, *options, stop=17).saved
    assert h.column(tmp_path, "step") == [5, 8, 10, 15, 16]
    assert t.latest_checkpoint(tmp_path) == furthest
    older = tmp_path / "step_12.pt"
    assert train(tmp_path, "--resume", older, stop="start 12").step == 12
    assert h.column(tmp_path, "step") == [5, 8, 10]
    # What was saved after going back is the latest one.
    back = train(tmp_path, "--resume", older, stop=13).saved
    assert t.latest_checkpoint(tmp_path) == back
    cut_short = train(tmp_path, "--resume", "latest", stop="evaluation 16").saved
    # As if the first of these sessions had died before it saved: it is evaluated again.
    for path in older, cut_short, cut_short:
        train(tmp_path, "--resume", path)
        h.assert_same_run(tmp_path, reference)


# ---- another place


def test_resuming_in_another_directory_leaves_the_old_one_alone(straight, tmp_path):
    options, reference = straight()
    path = train(tmp_path / "old", *options, stop=7).saved
    before = contents(tmp_path / "old")
    train(tmp_path / "new", "--resume", path)
    h.assert_same(*(h.final(one)["model_state_dict"] for one in (tmp_path / "new", reference)))
    rows = h.metrics_without_times(tmp_path / "new")
    assert rows == h.metrics_without_times(reference)[1:], "those before lie beside its checkpoints"
    assert contents(tmp_path / "old") == before


@pytest.mark.parametrize("resume", ["checkpoints/emergency_exit/emergency_step_7.pt", "latest"])
def test_a_run_that_was_copied_goes_on_where_it_is_now(straight, tmp_path, monkeypatch, resume):
    options, reference = straight()
    old, new = tmp_path / "old" / "checkpoints", tmp_path / "new" / "checkpoints"
    train(old, *options, stop=7)
    shutil.copytree(old.parent, new.parent)
    before = contents(old)
    monkeypatch.chdir(new.parent)
    train(None, "--resume", resume)
    h.assert_same_run(new, reference)
    assert contents(old) == before


# The file, its folder, the checkpoint directory.
@pytest.mark.parametrize("above", range(3))
def test_a_linked_checkpoint_goes_on_where_it_really_lies(straight, tmp_path, monkeypatch, above):
    options, reference = straight()
    path = train(tmp_path / "real", *options, stop=7).saved
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    linked = [path, *path.parents][above]
    Path("link").symlink_to(linked)
    train(None, "--resume", "link" / path.relative_to(linked))
    h.assert_same_run(tmp_path / "real", reference)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["link"]


# Before the first row, and after some.
@pytest.mark.parametrize("step", [2, 7])
def test_a_checkpoint_among_those_of_another_run_leaves_its_rows_alone(straight, tmp_path, step):
    options, reference = straight()
    path, other = train(tmp_path / "mine", *options, stop=step).saved, tmp_path / "other"
    train(other, *options, "--seed", 7)
    before = contents(other)
    shutil.copy(path, other / "mine.pt")
    train(None, "--resume", other / "mine.pt")
    assert contents(other).items() >= before.items()
    done = t.load_checkpoint(other / "final_2.pt")
    h.assert_same(done["model_state_dict"], h.final(reference)["model_state_dict"])
    # Those before lie beside the run's other checkpoints, and nobody has copied them.
    rows = h.metrics_without_times(reference)[step > 5 :]
    assert h.metrics_without_times(other, "metrics_2.csv") == rows


def test_other_data_is_refused_and_the_same_may_lie_elsewhere(straight, tmp_path):
    options, reference = straight()
    ck, data = tmp_path / "ck", Path(shutil.copy(options[1], tmp_path / "data.txt"))
    path = train(ck, *options, "--data", data, stop=7).saved
    data.write_bytes(data.read_bytes().replace(b"squared", b"SQUARED", 1))
    before = contents(ck)
    for other in ([], ["--data", h.corpus_of(tmp_path / "other.txt", 40, 16)]):
        message = h.refused("--resume", path, *other)
        assert f"the data is not what the run of {path} was trained on" in message
    assert contents(ck) == before
    train(None, "--resume", path, "--data", options[1])
    h.assert_same_run(ck, reference)


# ---- the end


def test_a_finished_run_says_that_nothing_is_left_to_do_and_changes_nothing(straight, tmp_path):
    train(tmp_path, *straight()[0])
    before = contents(tmp_path)
    again = h.run("--resume", "latest", "--checkpoint-dir", tmp_path)
    assert again.returncode == 0 and again.stderr == "" and "Training started" not in again.stdout
    assert "✅ Nothing left to do: step 30 of 30.\n" in again.stdout
    assert contents(tmp_path) == before
