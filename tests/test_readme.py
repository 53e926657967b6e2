"""What README says works as it says, for somebody who has just come.

In a fresh copy in an awkward place; and importing the file does nothing.
"""

import inspect
import os
import re
import shutil
import subprocess
import sys
import typing
import xml.etree.ElementTree

import pytest
from helpers import ROOT, SCRIPT, TINY, finish, run, saved_path

import train_graceful as t

README = (ROOT / "README.md").read_text()
OWN, MONITOR = re.findall(r"```python\n(.*?)```", README, re.S)
FILES = "train_graceful.py Makefile README.md requirements.txt checkpoints/.gitkeep".split()
TEXT = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}


@pytest.fixture
def visit(spawn, tmp_path):
    """A fresh copy, its path with spaces, and visit(*command) starts something in it.

    HOME is empty, and there is hardly a variable.
    """
    folder = tmp_path / "my first run"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    # As if installed: the same interpreter.
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "installed").touch()
    python = folder / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (tmp_path / "home").mkdir()
    environment = {"HOME": str(tmp_path / "home"), "PATH": os.environ["PATH"], "TERM": "xterm"}

    def start(*command, cwd=folder):
        words = ["sh", "-c", 'umask 077; exec "$@"', "sh", *map(str, command)]
        return spawn(command=words, cwd=str(cwd), env={**environment, "OMP_NUM_THREADS": "1"})

    return folder, start


def test_the_two_commands_work_as_written(visit, corpus, tmp_path):
    folder, start = visit
    child = start("make", "train", f"ARGS=--steps 100000 --data {corpus} {' '.join(TINY)}")
    child.expect("Training started.*step [0-9]+/")
    child.sendline("q")
    output = finish(child)
    path = saved_path(output.replace("my first run", "my_first_run"))
    assert child.exitstatus == 0 and "Resume with" in output
    assert "my_first_run/checkpoints/emergency_exit" in str(path)
    child = start("make", "resume")
    child.expect("Resumed at step [0-9]+ of 100000")
    child.expect("step [0-9]+/")
    child.sendline("q")
    assert "Graceful exit completed" in finish(child) and child.exitstatus == 0
    assert not list((tmp_path / "home").iterdir()) and "__pycache__" not in os.listdir(folder)
    saved = [*(folder / "checkpoints").rglob("[!.]*.*")]
    # As the umask says.
    assert saved and all(file.stat().st_mode & 0o077 == 0 for file in saved)


def test_a_source_tree_that_cannot_be_written_trains_elsewhere(visit, corpus, tmp_path):
    folder, start = visit
    for path in [folder, *folder.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    there = tmp_path / "else where"
    command = [sys.executable, folder / "train_graceful.py", "--checkpoint-dir", there]
    if os.getuid() == 0:  # whom permissions do not bind
        command = ["setpriv", "--reuid=65534", "--clear-groups", *command]
        for path in (tmp_path, *tmp_path.parents[:-2], corpus.parent):
            path.chmod(path.stat().st_mode | 0o055)
        tmp_path.chmod(0o777)
    child = start(*command, "--data", corpus, *TINY, "--steps", 3, cwd=tmp_path)
    output = finish(child)
    assert child.exitstatus == 0 and "All steps done" in output, output
    assert t.load_checkpoint(there / "final.pt")["step"] == 3
    for path in [folder, *folder.rglob("*")]:
        path.chmod(path.stat().st_mode | 0o700)


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
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "mine.py", "--epochs", "100000"]
    child = spawn(command=command, cwd=tmp_path, env=environment)
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
    where = ["--checkpoint-dir", tmp_path / "checkpoints"]
    assert run(*options, "--steps", "2", *where).returncode == 0
    [weights] = re.findall(r"`(torch.load\(.*?)`", README)
    command = [sys.executable, "-c", f"import torch; print(*{weights})"]
    result = subprocess.run(command, cwd=tmp_path, **TEXT)
    assert result.returncode == 0 and "token.weight" in result.stdout, result.stderr


def test_the_monitor_example_saves_and_leaves_on_q(spawn, tmp_path):
    told = MONITOR.replace("    while not", "    print('@training')\n    while not")
    child = spawn(source=f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{told}", cwd=tmp_path)
    child.expect("@training")
    child.sendline("q")
    child.expect("Exit requested!")
    finish(child)
    assert child.exitstatus == 0
    assert {*t.load_checkpoint(tmp_path / "mine.pt")} == {"model", "optimizer"}


def test_every_make_target_is_listed_and_readme_names_no_other():
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M)
    help = (["make"], ["make", "help-maintain"])
    listed = "".join(subprocess.run(one, cwd=ROOT, **TEXT).stdout for one in help)
    assert targets and all(re.search(rf"^make {target} +\S", listed, re.M) for target in targets)
    assert {*re.findall(r"(?:`|^    |\$ )make ([a-z-]+)", README, re.M)} <= {*targets}


def test_readme_is_read_in_one_sitting():
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
    result = subprocess.run([sys.executable, "-c", IMPORT, *PUBLIC], cwd=ROOT, **TEXT)
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
    """For uv and pipx, which read that."""
    tomllib = pytest.importorskip("tomllib")
    block = re.search(r"^# /// script\n(.*?)^# ///$", SCRIPT.read_text(), re.M | re.S)[1]
    needs = tomllib.loads(re.sub("^# ?", "", block, flags=re.M))
    required = re.findall("^[a-z]+", (ROOT / "requirements.txt").read_text(), re.M)
    assert needs == {"requires-python": ">=3.10", "dependencies": ["torch>=2.6", "numpy"]}
    assert {*required} == {"torch", "numpy", "pytest", "pexpect"}
    assert "version_info < (3, 10)" in (ROOT / "Makefile").read_text()


@pytest.mark.campaign
@pytest.mark.parametrize("tool", ["uv", "pipx"])
def test_uv_and_pipx_train_with_nothing_but_the_file(tool, tmp_path):
    """Whatever pip is configured to install from is where uv looks too."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "tools"], check=True)
    tools = tmp_path / "tools" / "bin"
    subprocess.run([tools / "pip", "install", "--quiet", "uv", "pipx"], check=True)
    links = subprocess.run([tools / "pip", "config", "get", "global.find-links"], **TEXT).stdout
    own = {"PIPX_HOME": str(tmp_path / "pipx"), "UV_CACHE_DIR": str(tmp_path / "uv")}
    environment = {**os.environ, **own, "UV_FIND_LINKS": links.strip()}
    (tmp_path / "alone").mkdir()
    shutil.copy(SCRIPT, tmp_path / "alone")
    command = [tools / tool, "run", "./train_graceful.py", *TINY, "--steps", "3", "--no-keyboard"]
    result = subprocess.run(command, cwd=tmp_path / "alone", env=environment, **TEXT)
    assert result.returncode == 0, result.stderr
    assert t.load_checkpoint(tmp_path / "alone" / "checkpoints" / "final.pt")["step"] == 3


def texts(svg: str) -> list[str]:
    """The lines of a picture of a terminal, as anybody's browser reads them; figures are N."""
    root = xml.etree.ElementTree.fromstring(svg)
    lines = ["".join(one.itertext()).strip() for one in root if one.tag.endswith("text")]
    return [re.sub(r"(inf|[0-9▁▂▃▄▅▆▇█#-])+(\.[0-9]+)?", "N", line) for line in lines]


def test_the_picture_of_readme_can_be_recorded_again():
    recorded = subprocess.run([ROOT / "scripts" / "record.sh", "2"], cwd="/", **TEXT)
    assert recorded.returncode == 0, recorded.stderr
    draw = [sys.executable, ROOT / "scripts" / "picture.py"]
    drawn = subprocess.run(draw, input=recorded.stdout, stdout=subprocess.PIPE, text=True)
    assert "(scripts/session.svg)" in README
    shown = texts((ROOT / "scripts" / "session.svg").read_text())
    # Line for line what README shows, but for its figures, and the time left may be in days.
    for ours, theirs in zip(texts(drawn.stdout), shown, strict=True):
        left = "left" in ours and "left" in theirs
        same = ours.replace("none yet", "N") == theirs
        assert same or left or ours.endswith("train_graceful.py")
