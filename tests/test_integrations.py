"""What needs other packages: README's examples for other trainers, each ended by q + Enter, and TensorBoard's files."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, finish, run
from test_readme import BLOCKS


@pytest.fixture
def started(spawn, tmp_path):
    """started(package) runs README's example for it, in a terminal and an empty folder; again in the same one."""
    def start(package: str):
        pytest.importorskip(package, reason=f"{package} is missing: make test-integrations")
        [example] = [block for block in BLOCKS if re.search(rf"^(import|from) {package}\b", block, re.M)]
        assert len([line for line in example.splitlines() if line.strip()]) <= 25
        if package == "accelerate":
            example = example.replace("optimizer.zero_grad()", "optimizer.zero_grad(); print('@batch')")
        return spawn(command=[sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{example}"], cwd=tmp_path)

    return start


@pytest.mark.parametrize("package, saved", [("transformers", "hf_checkpoints/checkpoint-1"), ("lightning", "lightning.ckpt")])
def test_a_trainer_leaves_on_q_with_a_checkpoint_and_goes_on(started, tmp_path, package, saved):
    steps = []
    for _ in range(2):
        child = started(package)
        child.sendline("q")  # heard as soon as there is a monitor; the trainer then ends after its first step
        child.expect("Exit requested!")
        child.expect(r"user_requested_graceful_exit (\d+)")
        steps.append(int(child.match[1]))
        finish(child)
        assert child.exitstatus == 0 and (tmp_path / saved).exists()
    assert 1 <= steps[0] < steps[1]


def test_accelerate_leaves_on_q_with_a_checkpoint_and_goes_on(started, tmp_path):
    for _ in range(2):
        child = started("accelerate")
        child.expect("@batch")
        child.sendline("q")
        child.expect("Exit requested!")
        child.expect("user_requested_graceful_exit")
        finish(child)
        assert child.exitstatus == 0 and list((tmp_path / "accelerate_checkpoint").glob("model*"))


def test_tensorboard_shows_a_run_that_died_and_went_on_as_one(options, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is missing: make test-integrations")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    die = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train_graceful as t
def log(run, validation_loss, original=t.Run._log):
    original(run, validation_loss)
    if run.step == 9:
        run.tensorboard.flush()
        os._exit(9)
t.Run._log = log
t.main()
"""
    arguments = [*options, "--steps", "16", "--log-every", "1", "--save-every", "6", "--eval-every", "8", "--tensorboard"]
    assert subprocess.run([sys.executable, "-c", die, *arguments], stdin=subprocess.DEVNULL).returncode == 9
    result = run("--resume", "latest", "--checkpoint-dir", tmp_path / "ck")
    assert result.returncode == 0 and "Resumed at step 8 of 16" in result.stdout, result.stdout + result.stderr
    events = EventAccumulator(str(tmp_path / "ck" / "tensorboard"))
    events.Reload()
    rows = [row.split(",") for row in (tmp_path / "ck" / "metrics.csv").read_text().splitlines()[1:]]
    assert [event.step for event in events.Scalars("loss/train")] == list(range(1, 17))
    assert [event.value for event in events.Scalars("loss/train")] == pytest.approx([float(row[2]) for row in rows])
    assert [event.step for event in events.Scalars("loss/validation")] == [8, 16]
    assert events.Scalars("lr/adamw")[-1].value == pytest.approx(float(rows[-1][4]))
