"""The examples, run as they are and ended by q + Enter; and what needs other packages."""

import re

import pytest
from conftest import ROOT, assert_same_run, finish

import train_graceful as t

EXAMPLES = ROOT / "scripts" / "examples"


@pytest.fixture
def example(spawn, tmp_path):
    """example(name, ...) runs scripts/examples/name in a terminal, in an empty folder; again in the same one."""

    def start(name: str, *arguments: object):
        return spawn(*arguments, script=EXAMPLES / name, cwd=tmp_path)

    return start


def test_the_plain_loop_saves_on_s_and_q_and_goes_on(example, tmp_path):
    child = example("plain_loop.py")
    # Heard as soon as there is a monitor.
    child.sendline("s")
    child.expect("Saving a checkpoint after this batch")
    child.expect(r"Saved mine.pt at step (\d+)")
    saved = int(child.match[1])
    child.sendline("q")
    child.expect("Exit requested!")
    child.expect(r"Saved mine.pt at step (\d+)")
    left = int(child.match[1])
    child.expect("Left because of user_requested_graceful_exit")
    finish(child)
    assert (
        child.exitstatus == 0 and saved <= left == t.load_checkpoint(tmp_path / "mine.pt")["step"]
    )

    child = example("plain_loop.py", "mine.pt")
    child.sendline("s")
    child.expect(r"Saved mine.pt at step (\d+)")
    assert int(child.match[1]) > left
    child.kill(15)
    child.expect("Left because of signal_SIGTERM")
    finish(child)
    assert child.exitstatus == 143


def test_the_own_model_left_on_q_and_resumed_is_the_run_that_was_never_stopped(example, tmp_path):
    options = ["--epochs", 1, "--log-every", 1, "--eval-every", 10]
    straight = example("own_model.py", *options, "--workers", 0, "--checkpoint-dir", "straight")
    finish(straight)
    assert straight.exitstatus == 0
    child = example("own_model.py", *options)
    child.expect(r"step \d+/31")
    child.sendline("q")
    child.expect("Graceful exit completed!")
    finish(child)
    child = example("own_model.py", "--resume", "latest")
    child.expect(r"Resumed at step (\d+) of 31")
    assert 1 <= int(child.match[1]) < 31
    child.expect("Best Accuracy: 0[.]")
    finish(child)
    assert child.exitstatus == 0
    assert_same_run(tmp_path / "straight", tmp_path / "checkpoints")


TRAINERS = [
    ("transformers", "huggingface.py", "hf_checkpoints/checkpoint-*"),
    ("lightning", "lightning_trainer.py", "lightning.ckpt"),
]


@pytest.mark.parametrize("package, name, saved", TRAINERS)
def test_a_trainer_leaves_on_q_with_a_checkpoint_and_goes_on(
    example, tmp_path, package, name, saved
):
    pytest.importorskip(package, reason=f"{package} is missing: make test-integrations")
    steps = []
    for _ in range(2):
        child = example(name)
        # Heard as soon as there is a monitor; the trainer then ends after its first step.
        child.sendline("q")
        child.expect("Exit requested!")
        child.expect(r"Left at step (\d+) because of user_requested_graceful_exit")
        steps.append(int(child.match[1]))
        finish(child)
        assert child.exitstatus == 0 and list(tmp_path.glob(saved))
    assert 1 <= steps[0] < steps[1]


def test_accelerate_leaves_on_q_with_a_checkpoint_and_goes_on(example, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is missing: make test-integrations")
    weights = []
    for _ in range(2):
        child = example("accelerate_loop.py")
        child.expect("Epoch 1")
        child.sendline("q")
        child.expect("Exit requested!")
        child.expect("Left because of user_requested_graceful_exit")
        finish(child)
        [file] = (tmp_path / "accelerate_checkpoint").glob("model*")
        weights.append(file.read_bytes())
        assert child.exitstatus == 0
    assert weights[0] != weights[1]


def test_every_example_fits_on_a_screen():
    """Except the own model, whose data and model are made up there too."""
    for path in sorted(EXAMPLES.glob("*.py")):
        code = re.sub('""".*?"""', "", path.read_text(), flags=re.S)
        lines = [line for line in code.splitlines() if line.strip() and "#" not in line]
        assert len(lines) <= (60 if path.name == "own_model.py" else 36), path
