"""What the README says runs as it says."""

import re
import subprocess
import sys

from conftest import ROOT, run

import train_graceful as t

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_weights_example_runs_without_this_program(options, tmp_path):
    done = run(*options, "--steps", 2, "--checkpoint-dir", tmp_path / "checkpoints")
    assert done.returncode == 0, done.stderr
    [example] = [block for block in BLOCKS if "torch.load(" in block]
    command = [sys.executable, "-c", example]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("2 "), result.stderr


def test_every_option_is_described():
    for name in {**t.OPTIONS, **t.COMMON_OPTIONS, **t.NOT_STORED}:
        assert re.search(rf"--(no-)?{name.replace('_', '-')}\b", README), name


def test_every_make_target_is_listed():
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M)
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True).stdout
    assert targets and all(f"make {target} " in listed for target in targets)


def test_every_example_is_linked_and_every_link_into_the_project_leads_somewhere():
    links = set(re.findall(r"\]\(([^)#:]+)\)", README))
    examples = {str(path.relative_to(ROOT)) for path in ROOT.glob("scripts/examples/*.py")}
    assert examples <= links
    assert all((ROOT / link).exists() for link in links)
