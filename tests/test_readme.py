"""What the README says runs as it says."""

import re
import subprocess
import sys

from conftest import ROOT, finish, run

import train_graceful as t

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_weights_example_runs_without_this_program(options, tmp_path):
    assert run(*options, "--steps", "2", "--checkpoint-dir", tmp_path / "checkpoints").returncode == 0
    result = subprocess.run([sys.executable, "-c", BLOCKS[0]], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("2 "), result.stderr


def test_the_monitor_example_leaves_on_q_and_goes_on(spawn, tmp_path):
    example = BLOCKS[1]
    steps = []
    for resume_from in (None, "mine.pt"):
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + example.replace(
            "resume_from = None", f"resume_from = {resume_from!r}").replace("while step <", "print('@training')\n    while step <")
        child = spawn(command=[sys.executable, "-c", code], cwd=tmp_path)
        child.expect("@training")
        child.sendline("q")
        child.expect("Exit requested!")
        child.expect("user_requested_graceful_exit 0")
        finish(child)
        assert child.exitstatus == 0
        steps.append(t.load_checkpoint(tmp_path / "mine.pt")["step"])
    assert 0 <= steps[0] < steps[1]


def test_every_option_and_make_target_is_described():
    for field in t.dataclasses.fields(t.Config):
        assert f"--{field.name.replace('_', '-')}" in README
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M)
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True).stdout
    assert targets and all(f"make {target} " in listed for target in targets)
