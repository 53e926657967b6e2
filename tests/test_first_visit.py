"""The first minutes: a fresh copy in an awkward place, and what importing the file does (nothing)."""

import inspect
import os
import re
import shutil
import subprocess
import sys
import typing
import xml.etree.ElementTree

import pexpect
import pytest
from helpers import ROOT, TINY, finish, saved_path

import train_graceful as t

TRACKED = [
    "train_graceful.py",
    "Makefile",
    "README.md",
    "requirements.txt",
    "scripts",
    "checkpoints/.gitkeep",
]


@pytest.fixture
def copy(tmp_path):
    """A copy of what a new user gets, its path with spaces, and an environment with an empty HOME and hardly a variable."""
    folder = tmp_path / "my first run"
    for name in TRACKED:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, target)
    (folder / ".venv" / "bin").mkdir(parents=True)  # as if installed: the same interpreter
    (folder / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / ".venv" / "bin" / "python").chmod(0o755)
    (folder / ".venv" / "installed").touch()
    (tmp_path / "home").mkdir()
    return folder, {
        "HOME": str(tmp_path / "home"),
        "PATH": os.environ["PATH"],
        "TERM": "xterm",
        "OMP_NUM_THREADS": "1",
    }


def in_terminal(command: list, folder, environment, umask: int = 0o077):
    return pexpect.spawn(
        command[0],
        [str(word) for word in command[1:]],
        cwd=str(folder),
        env=environment,
        encoding="utf-8",
        timeout=60,
        dimensions=(24, 160),
        preexec_fn=lambda: os.umask(umask),
    )


def test_the_two_commands_of_the_readme_work_as_written(copy, corpus, tmp_path):
    folder, environment = copy
    options = f"ARGS=--steps 100000 --data {corpus} {' '.join(TINY)}"
    child = in_terminal(["make", "train", options], folder, environment)
    child.expect("Training started.*step [0-9]+/")
    child.sendline("q")
    output = finish(child)
    path = saved_path(output.replace("my first run", "my_first_run"))
    assert (
        child.exitstatus == 0
        and "Resume with" in output
        and "my_first_run/checkpoints/emergency_exit" in str(path)
    )
    child = in_terminal(["make", "resume"], folder, environment)
    child.expect("Resumed at step [0-9]+ of 100000")
    child.expect("step [0-9]+/")
    child.sendline("q")
    assert "Graceful exit completed" in finish(child) and child.exitstatus == 0
    assert not list((tmp_path / "home").iterdir()) and "__pycache__" not in os.listdir(folder)
    saved = [
        file
        for file in (folder / "checkpoints").rglob("*")
        if file.is_file() and file.name != ".gitkeep"
    ]
    assert saved and all(file.stat().st_mode & 0o077 == 0 for file in saved)  # as the umask says


def test_a_source_tree_that_cannot_be_written_trains_elsewhere(copy, corpus, tmp_path):
    folder, environment = copy
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & ~0o222)
    command = [
        sys.executable,
        folder / "train_graceful.py",
        "--data",
        corpus,
        *TINY,
        "--steps",
        3,
        "--checkpoint-dir",
        tmp_path / "else where",
    ]
    if os.getuid() == 0:  # whom permissions do not bind
        command = ["setpriv", "--reuid=65534", "--clear-groups", *command]
        for path in (tmp_path, corpus.parent):
            while os.stat(path).st_mode & 0o005 != 0o005 and path != path.parent:
                path.chmod(path.stat().st_mode | 0o055)
                path = path.parent
        tmp_path.chmod(0o777)
    child = in_terminal(command, tmp_path, environment)
    output = finish(child)
    assert child.exitstatus == 0 and "All steps done" in output, output
    assert t.load_checkpoint(tmp_path / "else where" / "final.pt")["step"] == 3
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | 0o700)


IMPORT = """
import signal, sys, threading, torch, random, os
def state():
    return ([signal.getsignal(number) for number in signal.valid_signals() if number not in (signal.SIGKILL, signal.SIGSTOP)],
            threading.enumerate(), torch.get_rng_state().tolist(), random.getstate(), dict(os.environ), os.getcwd(), os.listdir("/proc/self/fd"),
            torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(), sys.stdout, sys.stderr, sys.excepthook)
before = state()
import train_graceful
assert state() == before
from train_graceful import *
print(set(sys.argv[1:]) <= set(dir()))
"""


PUBLIC = """ByteLM CheckpointError ExitMonitor Experts GeometricTrainingController Run
StandardTrainingController UserError begin_worker controller_training_loop find_checkpoints
latest_checkpoint load_checkpoint main option save_checkpoint standard_training_loop"""


def test_importing_the_file_starts_nothing_and_changes_nothing(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", IMPORT, *PUBLIC.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0 and result.stdout == "True\n", result.stderr


def test_every_public_name_is_documented_and_typed():
    for name in PUBLIC.split():
        thing = getattr(t, name)
        assert thing.__doc__ and "(" not in thing.__doc__.partition("\n")[0][:1], name
        methods = (
            [thing]
            if inspect.isfunction(thing)
            else [
                member
                for key, member in vars(thing).items()
                if inspect.isfunction(member) and key[0] != "_"
            ]
        )
        for function in methods:
            hints = typing.get_type_hints(function)
            missing = [
                parameter
                for parameter in inspect.signature(function).parameters
                if parameter not in hints and parameter != "self"
            ]
            assert not missing and "return" in hints, (name, function.__name__, missing)


def test_the_script_itself_says_what_it_needs():
    """For uv and pipx, which read that."""
    tomllib = pytest.importorskip("tomllib")
    block = re.search(
        r"^# /// script\n(.*?)^# ///$", (ROOT / "train_graceful.py").read_text(), re.M | re.S
    )[1]
    needs = tomllib.loads(re.sub("^# ?", "", block, flags=re.M))
    required = [
        line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1].isalpha()
    ]
    packages = {re.match("[a-z]+", line)[0]: line for line in required}
    assert needs == {"requires-python": ">=3.10", "dependencies": ["torch>=2.6", "numpy"]}
    assert set(packages) == {"torch", "numpy", "pytest", "pexpect"}
    assert "version_info < (3, 10)" in (ROOT / "Makefile").read_text()


@pytest.mark.campaign
@pytest.mark.parametrize("command", [("uv", "run"), ("pipx", "run")])
def test_uv_and_pipx_train_with_nothing_but_the_file(command, tmp_path):
    """Whatever pip is configured to install from is where uv looks too."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "tools"], check=True)
    pip = tmp_path / "tools" / "bin" / "pip"
    subprocess.run([pip, "install", "--quiet", "uv", "pipx"], check=True)
    links = subprocess.run(
        [pip, "config", "get", "global.find-links"], capture_output=True, text=True
    ).stdout.strip()
    environment = {
        **os.environ,
        "PIPX_HOME": str(tmp_path / "pipx"),
        "UV_CACHE_DIR": str(tmp_path / "uv"),
        "UV_FIND_LINKS": links,
    }
    (tmp_path / "alone").mkdir()
    shutil.copy(ROOT / "train_graceful.py", tmp_path / "alone")
    tool, verb = command
    words = [
        tmp_path / "tools" / "bin" / tool,
        verb,
        "./train_graceful.py",
        *TINY,
        "--steps",
        "3",
        "--no-keyboard",
    ]
    result = subprocess.run(
        [str(word) for word in words],
        cwd=tmp_path / "alone",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert t.load_checkpoint(tmp_path / "alone" / "checkpoints" / "final.pt")["step"] == 3


def test_the_picture_of_readme_can_be_recorded_again():
    result = subprocess.run(
        [str(ROOT / "scripts" / "record.sh"), "2"],
        cwd="/",
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, result.stderr
    drawn = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "picture.py")],
        input=result.stdout,
        capture_output=True,
        text=True,
    ).stdout
    assert "(scripts/session.svg)" in (ROOT / "README.md").read_text()
    recorded, shown = [
        [re.sub(r"(inf|[0-9▁▂▃▄▅▆▇█#-])+(\.[0-9]+)?", "N", line) for line in texts(svg)]
        for svg in (drawn, (ROOT / "scripts" / "session.svg").read_text())
    ]
    # Line for line what README shows, but for its figures, and the time left may be in days.
    for ours, theirs in zip(recorded, shown, strict=True):
        ours = ours.replace("none yet", "N")
        assert (
            ours == theirs
            or ours.endswith("train_graceful.py")
            or "left" in ours
            and "left" in theirs
        )


def texts(svg: str) -> list[str]:
    """The lines of a picture of a terminal, as anybody's browser reads them."""
    root = xml.etree.ElementTree.fromstring(svg)
    return ["".join(element.itertext()).strip() for element in root if element.tag.endswith("text")]
