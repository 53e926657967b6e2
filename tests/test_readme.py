"""What the README says runs as it says."""

import os
import re
import subprocess
import sys

from helpers import ROOT, finish, forked, run

import train_graceful as t

README = (ROOT / "README.md").read_text()
OWN, MONITOR = re.findall(r"```python\n(.*?)```", README, re.S)
MYDATA = """
import torch

class Images(torch.utils.data.Dataset):
    def __init__(self, train):
        self.count = 200 if train else 50

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return torch.randn(3, 8, 8), index % 10

def cnn():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
"""


def test_the_example_of_ones_own_model_is_stopped_and_resumed(spawn, tmp_path):
    (tmp_path / "mydata.py").write_text(MYDATA)
    (tmp_path / "mine.py").write_text(OWN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = spawn(
        command=[sys.executable, "mine.py", "--epochs", "100000"], cwd=tmp_path, env=environment
    )
    child.expect("step [0-9]+/")
    child.sendline("q")
    output = finish(child)
    assert child.exitstatus == 0
    child = spawn(command=["sh", "-c", output.rpartition("Resume with: ")[2].strip()], cwd=tmp_path)
    child.expect("Resumed at step [0-9]+ of 300000")
    child.expect("step [0-9]+/")
    child.sendline("q")
    finish(child)
    assert child.exitstatus == 0


def test_the_weights_example_runs_without_this_program(options, tmp_path):
    assert (
        run(*options, "--steps", "2", "--checkpoint-dir", tmp_path / "checkpoints").returncode == 0
    )
    [weights] = re.findall(r"`(torch.load\(.*?)`", README)
    code = f"import torch; print(*{weights})"
    result = forked([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and "token.weight" in result.stdout, result.stderr


def test_the_monitor_example_saves_and_leaves_on_q(spawn, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + MONITOR.replace(
        "    while not", "    print('@training')\n    while not"
    )
    child = spawn(source=code, cwd=tmp_path)
    child.expect("@training")
    child.sendline("q")
    child.expect("Exit requested!")
    finish(child)
    assert child.exitstatus == 0
    assert set(t.load_checkpoint(tmp_path / "mine.pt")) == {"model", "optimizer"}


def test_every_make_target_is_listed():
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M)
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True).stdout
    assert targets and all(f"make {target} " in listed for target in targets)
    assert all(
        target in targets for target in re.findall(r"(?:`|^    |\$ )make ([a-z-]+)", README, re.M)
    )


def test_readme_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 200
