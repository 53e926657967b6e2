"""Options are what main's arguments say; a mistake in them is one line, and nothing is written."""

import os
import subprocess
import sys
from pathlib import Path

import helpers as h
import numpy as np
import pytest
import torch
from torch import nn

import train_graceful as t


@pytest.fixture
def wrong(tmp_path, monkeypatch):
    """wrong(*args) is the message that this command line ends with; it has written nothing."""
    monkeypatch.chdir(tmp_path)

    def check(*args) -> str:
        before = sorted(tmp_path.rglob("*"))
        message = h.refused(*args)
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return check


# A command line, and what names the mistake.
MISTAKES = f"""
--steps 0            | --steps 0 is not 1 or more
--steps 1.5          | argument --steps: invalid int value: '1.5'
--steps {"9" * 20}   | --steps below
--dropout 1          | --dropout 1 is not 0 or more and below 1
--lr nan             | --lr nan is not
--seed -1            | --seed -1
--mode geometric --loop standard    | --mode geometric --loop
--mode geometric --dim 1 --heads 1  | --heads has to divide --dim
--dim 10 --heads 4                  | --heads has to divide --dim
--experts 1000 --dim 16             | --experts be at most 4 times --dim
--no-such-option     | --no-such-option
--resume=            | a directory, not a checkpoint
""".strip().splitlines()


@pytest.mark.parametrize("line", MISTAKES, ids=lambda line: line.partition("|")[0].strip()[:30])
def test_a_bad_option_is_named(wrong, line):
    arguments, words = (half.split() for half in line.split("|"))
    message = wrong(*arguments)
    assert all(word in message for word in words), message


def test_a_device_that_is_not_there_is_named(wrong, monkeypatch):
    """Of many processes, one Apple GPU is for none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda: here it can be" in wrong("--device", "cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert t.choose_device("auto").type == t.choose_device("mps").type == "mps"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    assert t.choose_device("auto").type == "cpu"
    with pytest.raises(t.UserError, match="--device mps: here it can be cpu"):
        t.choose_device("mps")


def test_data_and_directories_that_cannot_be_used_are_named(wrong, tmp_path, corpus):
    (tmp_path / "short").write_text("x" * 20)
    (tmp_path / "folder").mkdir()
    words = {"folder": "too few", "short": "too few", "missing": "No such file"}
    for name, word in words.items():
        message = wrong("--data", tmp_path / name)
        assert str(tmp_path / name) in message and word in message
    assert "where 100000 are needed" in wrong("--data", corpus, "--batch-size", "100000")
    for bad in (tmp_path / "short", tmp_path / "short" / "sub", "/proc/checkpoints"):
        message = wrong("--data", corpus, *h.TINY, "--checkpoint-dir", bad)
        assert f"--checkpoint-dir {bad}: " in message


def test_an_error_is_one_line_without_usage_or_traceback_and_main_ends_with_its_code(tmp_path):
    code = "import train_graceful as tg; tg.main(lambda run: None); print('not reached')"
    for words, expected in (([], 0), (["--steps", "x"], 2), (["--help"], 0)):
        command = [sys.executable, "-c", code, "--checkpoint-dir", tmp_path, *words]
        how = {"cwd": h.ROOT, "capture_output": True, "text": True}
        result = h.forked(command, start=subprocess.run, **how)
        assert result.returncode == expected and "not reached" not in result.stdout
        lines = result.stderr.splitlines()
        assert [line[:7] for line in lines] == ["error: "] * (expected == 2)
    assert result.stdout and not list(tmp_path.iterdir())


# ---- a script of one's own: main(train, **options)


def train_mine(run: t.Run) -> None:
    """Fits noise."""
    run.data([torch.randn(4) for _ in range(8)])
    model = run.model(nn.Linear(4, run.options.width))
    optimizer = run.keep(optimizer=torch.optim.SGD(model.parameters(), run.options.speed))
    for batch in run.batches():
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


OWN = {
    "width": 3,
    "speed": np.float32(0.5),
    "deep": True,
    "note": "",
    "sizes": (1, 2),
    "flavour": t.option("mild", "how it tastes: 100 % of it", choices=("mild", "hot")),
    "color": t.option("red", "of the picture", fixed=False),
    "limit": t.option(None, "of something", kind=int, least=2, below=10),
    "batch_size": 2,
    "steps": 2,
    "checkpoint_dir": "mine",
}


@pytest.fixture
def mine(tmp_path, monkeypatch, capfd):
    """mine(code, *args) is the own script in tmp_path: its options as a dict, or its one line."""
    monkeypatch.chdir(tmp_path)

    def session_of_mine(code: int, *args, **changes):
        how = {"defaults": OWN, **changes}
        if code:
            return h.mistake(capfd, train_mine, None, *args, **how)
        return vars(h.go(train_mine, None, *args, **how).options)

    return session_of_mine


def test_help_groups_the_options_and_says_defaults_and_choices(capsys):
    common, own = h.run("--help").stdout.split("\nthis program:\n")
    for name in t.declared(t.OPTIONS):
        group = common if name in t.COMMON_OPTIONS else own
        assert f"\n  {t.flag(name)}" in f"\n{group}", name
    assert h.session("--help", train=train_mine, **OWN) == 0
    common, own = capsys.readouterr().out.split("\nthis program:\n")
    assert "Fits noise." in common and "(default 2)" in common
    own = " ".join(own.split())
    assert "--width WIDTH (default 3) --speed SPEED (default 0.5) --deep, --no-deep" in own
    assert "--flavour {mild,hot} how it tastes: 100 % of it (default mild)" in own


def test_an_own_option_has_the_type_of_its_default(mine):
    values = {name: one.default if isinstance(one, t.option) else one for name, one in OWN.items()}
    values["checkpoint_dir"] = os.path.abspath("mine")
    default = mine(0)
    assert default.items() >= values.items() and type(default["speed"]) is float
    words = "--width 1000 --speed 1 --no-deep --sizes 4 5 6 --flavour=hot --limit 9"
    given = mine(0, *words.split(), "--note", "a b", "--checkpoint-dir", "other")
    values.update(width=1000, speed=1.0, deep=False, note="a b", sizes=(4, 5, 6), flavour="hot")
    values.update(limit=9, checkpoint_dir=os.path.abspath("other"))
    assert given.items() >= values.items()
    assert type(given["speed"]) is float


def test_what_makes_a_run_stays_as_it_is_in_its_checkpoint(mine):
    """A change is named with both values, and a default that was edited since changes nothing."""
    mine(0, "--width", 5, "--sizes", 4, "--color", "blue", "--no-deep")
    resume = ("--resume", "latest", "--steps", 4)
    for name, new, old in (("width", 6, 5), ("note", "x", ""), ("limit", 3, None), ("seed", 7, 0)):
        error = mine(2, *resume, f"--{name}", new)
        assert f"--{name} {new} does not fit the checkpoint, whose run has --{name} {old}" in error
    assert "--deep" in mine(2, *resume, "--deep")
    edited = {"width": 7, "speed": 0.1, "color": "red", "another": 4}
    options = mine(0, *resume, **edited)
    made = {"width": 5, "speed": 0.5, "sizes": (4,), "deep": False}
    assert options.items() >= {**made, "color": "blue", "another": 4}.items()
    same = "--width 5 --no-deep --sizes 4 --color green".split()
    options = mine(0, "--resume", "latest", *same, another=4)
    assert options.items() >= {**made, "color": "green"}.items()


def test_a_checkpoint_of_another_program_is_told_by_its_options(mine, tmp_path):
    mine(0)
    message = h.refused("--resume", tmp_path / "mine" / "final.pt")
    said = "; --weights in the place of --resume begins a new run from its weights"
    assert "final.pt: here is no --" in message and message.endswith(said)


def test_what_a_script_says_itself_may_be_wrong_too(mine):
    assert mine(2, resume="latest").endswith("mine: no checkpoint there\n")
    assert "how long? Give --steps (or --epochs, but not of a stream)" in mine(2, steps=None)
    assert "['config']['note'] cannot be saved: it is a pathlib." in mine(2, note=Path("x"))
    assert mine(0, "--epochs", 1, steps=None, resume="auto")["epochs"] == 1


BAD = ["", "x", "-1", "nan", "inf", "1e400", "9" * 5000, "1.5", "0", "\ud800", "a\nb"]


@pytest.mark.parametrize("name", [*{**t.OPTIONS, **OWN, **t.COMMON_OPTIONS}])
def test_whatever_stands_behind_an_option_is_taken_or_one_line(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for value in BAD:
        seen = []
        own = {"train": seen.append, **t.OPTIONS, **OWN}
        code = h.session(f"{t.flag(name)}={value}", **own)
        errors = capfd.readouterr().err
        assert code == (0 if seen else 2), value
        if code and name not in ("resume", "weights"):
            assert errors.startswith("error: ") and errors.count("\n") == 1
            assert len(errors) < 6000 and t.flag(name) in errors
    assert not list(tmp_path.iterdir())
