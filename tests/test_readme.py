"""What README says works as it says, in a fresh copy, too; and importing the file does nothing."""

import inspect
import os
import re
import shutil
import subprocess
import sys
import typing

import helpers as h
import pytest

import train_graceful as t

README = (h.ROOT / "README.md").read_text()
OWN, MONITOR = re.findall(r"```python\n(.*?)```", README, re.S)
FILES = "train_graceful.py Makefile README.md requirements.txt checkpoints/.gitkeep".split()
TEXT = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}


def test_the_two_commands_work_as_written(spawn, corpus, tmp_path):
    """In a fresh copy, its path with spaces. HOME is empty, and there is hardly a variable."""
    folder, home = tmp_path / "my first run", tmp_path / "home"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(h.ROOT / name, folder / name)
    # As if installed: the same interpreter.
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "installed").touch()
    python = folder / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    home.mkdir()
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "TERM": "xterm"}
    how = {"cwd": str(folder), "env": {**environment, "OMP_NUM_THREADS": "1"}}
    words = f"ARGS=--steps 100000 --data {corpus} {' '.join(h.TINY)}"
    child = spawn(command=["make", "train", words], **how)
    child.expect("Training started.*step [0-9]+/")
    child.sendline("q")
    output = h.finish(child)
    assert child.exitstatus == 0 and "Resume with" in output
    assert f"checkpoint saved: {folder}/checkpoints/emergency_exit/emergency_step_" in output
    child = spawn(command=["make", "resume"], **how)
    child.expect("Resumed at step [0-9]+ of 100000")
    child.expect("step [0-9]+/")
    child.sendline("q")
    assert "Graceful exit completed" in h.finish(child) and child.exitstatus == 0
    assert not list(home.iterdir()) and "__pycache__" not in os.listdir(folder)


MYDATA = """
import torch

def Images(train):
    return [(torch.randn(3, 8, 8), index % 10) for index in range(200 if train else 50)]

def cnn():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
"""


def test_the_example_of_ones_own_model_is_stopped_and_resumed(spawn, tmp_path):
    (tmp_path / "mydata.py").write_text(MYDATA)
    (tmp_path / "mine.py").write_text(OWN)
    environment = {**os.environ, "PYTHONPATH": str(h.ROOT)}
    command = [sys.executable, "mine.py", "--epochs", "100000"]
    child = spawn(command=command, cwd=tmp_path, env=environment)
    child.expect("step [0-9]+/")
    child.sendline("q")
    output = h.finish(child)
    assert child.exitstatus == 0
    child = spawn(command=["sh", "-c", output.rpartition("Resume with: ")[2].strip()], cwd=tmp_path)
    child.expect("Resumed at step [0-9]+ of 300000")
    child.expect("step [0-9]+/")
    child.sendline("q")
    h.finish(child)
    assert child.exitstatus == 0


def test_the_weights_example_runs_without_this_program(options, tmp_path):
    where = ["--checkpoint-dir", tmp_path / "checkpoints"]
    assert h.run(*options, "--steps", "2", *where).returncode == 0
    [weights] = re.findall(r"`(torch.load\(.*?)`", README)
    command = [sys.executable, "-c", f"import torch; print(*{weights})"]
    result = subprocess.run(command, cwd=tmp_path, **TEXT)
    assert result.returncode == 0 and "token.weight" in result.stdout, result.stderr


def test_the_monitor_example_saves_and_leaves_on_q(spawn, tmp_path):
    told = MONITOR.replace("    while not", "    print('@training')\n    while not")
    child = spawn(source=f"import sys; sys.path.insert(0, {str(h.ROOT)!r})\n{told}", cwd=tmp_path)
    child.expect("@training")
    child.sendline("q")
    child.expect("Exit requested!")
    h.finish(child)
    assert child.exitstatus == 0
    assert {*t.load_checkpoint(tmp_path / "mine.pt")} == {"model", "optimizer"}


def test_every_make_target_is_listed_and_readme_is_short_and_names_no_other():
    words = re.search(r"^\.PHONY: (.+)", (h.ROOT / "Makefile").read_text(), re.M)[1].split()
    targets = {*words} - {"help", "help-maintain"}
    help = (["make"], ["make", "help-maintain"])
    listed = "".join(subprocess.run(one, cwd=h.ROOT, **TEXT).stdout for one in help)
    assert all(re.search(rf"^make {target} +\S", listed, re.M) for target in targets)
    assert {*re.findall(r"(?:`|^    |\$ )make ([a-z-]+)", README, re.M)} <= targets
    assert len(README.splitlines()) <= 200


# ---- the file alone

IMPORT = """
import os, random, signal, sys, threading, torch
def state():
    signals = {*signal.valid_signals()} - {signal.SIGKILL, signal.SIGSTOP}
    return (
        *([signal.getsignal(number) for number in signals], threading.enumerate()),
        *(torch.get_rng_state().tolist(), random.getstate(), torch.get_num_threads()),
        *(dict(os.environ), os.getcwd(), os.listdir("/proc/self/fd")),
        *(torch.are_deterministic_algorithms_enabled(), sys.stdout, sys.stderr, sys.excepthook),
    )
before = state()
import train_graceful
assert state() == before
from train_graceful import *
print(set(sys.argv[1:]) <= set(dir()))
"""
PUBLIC = """ByteLM CheckpointError ExitMonitor Experts GeometricTrainingController Run
StandardTrainingController UserError begin_worker controller_training_loop find_checkpoints
latest_checkpoint load_checkpoint main option save_checkpoint standard_training_loop""".split()


def test_importing_the_file_starts_nothing_and_changes_nothing():
    result = subprocess.run([sys.executable, "-c", IMPORT, *PUBLIC], cwd=h.ROOT, **TEXT)
    assert result.returncode == 0 and result.stdout == "True\n", result.stderr


def test_every_public_name_is_documented_and_typed():
    for name in PUBLIC:
        thing = getattr(t, name)
        assert thing.__doc__ and not thing.__doc__.startswith("("), name
        members = [one for key, one in vars(thing).items() if key[0] != "_"]
        for function in filter(inspect.isfunction, [thing, *members]):
            hints = typing.get_type_hints(function)
            missing = {*inspect.signature(function).parameters} - {*hints, "self"}
            assert not missing and "return" in hints, (name, function.__name__, missing)


def test_the_script_itself_says_what_it_needs():
    """For uv, which reads that."""
    tomllib = pytest.importorskip("tomllib")
    block = re.search(r"^# /// script\n(.*?)^# ///$", h.SCRIPT.read_text(), re.M | re.S)[1]
    needs = tomllib.loads(re.sub("^# ?", "", block, flags=re.M))
    assert needs == {"requires-python": ">=3.10", "dependencies": ["torch>=2.6", "numpy"]}


@pytest.mark.campaign
def test_uv_trains_with_nothing_but_the_file(tmp_path):
    """Whatever pip is configured to install from is where uv looks too."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "tools"], check=True)
    tools = tmp_path / "tools" / "bin"
    subprocess.run([tools / "pip", "install", "--quiet", "uv"], check=True)
    links = subprocess.run([tools / "pip", "config", "get", "global.find-links"], **TEXT).stdout
    own = {"UV_CACHE_DIR": str(tmp_path / "uv"), "UV_FIND_LINKS": links.strip()}
    environment = {**os.environ, **own}
    (tmp_path / "alone").mkdir()
    shutil.copy(h.SCRIPT, tmp_path / "alone")
    command = [tools / "uv", "run", "./train_graceful.py", *h.TINY, "--steps", "3", "--no-keyboard"]
    result = subprocess.run(command, cwd=tmp_path / "alone", env=environment, **TEXT)
    assert result.returncode == 0, result.stderr
    assert t.load_checkpoint(tmp_path / "alone" / "checkpoints" / "final.pt")["step"] == 3
