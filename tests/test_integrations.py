"""README's examples for other trainers: q + Enter ends each with a checkpoint, from which the next start goes on."""

import re
import sys

import pytest
from conftest import ROOT, finish
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
