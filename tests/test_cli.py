"""A mistake in what is given is one line on stderr and exit code 2, and nothing is written.

Options are what main's arguments say, of the type of their default, and what makes a run stays.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import MODES, ROOT, TINY, forked, refused, run, session
from torch import nn

import train_graceful as t


@pytest.fixture
def mistake(tmp_path, monkeypatch):
    """mistake(*args) is the message that this command line ends with; it has written nothing."""
    monkeypatch.chdir(tmp_path)

    def check(*args) -> str:
        before = sorted(tmp_path.rglob("*"))
        message = refused(*args)
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return check


# A command line, and what names the mistake.
MISTAKES = f"""
--steps 0            | --steps 0 is not 1 or more
--steps 1.5          | argument --steps: invalid int value: '1.5'
--steps inf          | --steps inf
--steps -5           | --steps -5
--steps many         | --steps many
--steps 1e400        | --steps 1e400
--steps {"9" * 20}   | --steps below
--steps {"9" * 5000} | --steps
--steps              | argument --steps: expected one argument
--dropout 1          | --dropout 1 is not 0 or more and below 1
--lr nan             | --lr nan is not
--lr 0               | --lr 0
--lr inf             | --lr inf below
--seed -1            | --seed -1
--workers -1         | --workers -1
--mode spherical     | --mode spherical geometric
--mode geometric --loop standard    | --mode geometric --loop
--mode geometric --dim 1 --heads 1  | --heads has to divide --dim
--dim 10 --heads 4                  | --heads has to divide --dim
--experts 1000 --dim 16             | --experts be at most 4 times --dim
--context 100000000  | --data too few
--no-such-option     | --no-such-option
--device tpu         | --device tpu
--compile=1          | --compile
--resume=            | a directory, not a checkpoint
train                | train
""".strip().splitlines()


@pytest.mark.parametrize("line", MISTAKES, ids=lambda line: line.partition("|")[0].strip()[:30])
def test_a_bad_option_is_named(mistake, line):
    arguments, words = (half.split() for half in line.split("|"))
    message = mistake(*arguments)
    assert all(word in message for word in words), message


def test_a_device_that_is_not_there_is_named(mistake, monkeypatch):
    """Of many processes, one Apple GPU is for none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda: here it can be" in mistake("--device", "cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert t.choose_device("auto").type == t.choose_device("mps").type == "mps"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    assert t.choose_device("auto").type == "cpu"
    with pytest.raises(t.UserError, match="--device mps: here it can be cpu"):
        t.choose_device("mps")


def test_data_and_directories_that_cannot_be_used_are_named(mistake, tmp_path, corpus):
    for name, size in (("empty", 0), ("short", 20), ("secret", 100_000)):
        (tmp_path / name).write_text("x" * size)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    words = dict.fromkeys(["empty", "folder", "fifo", "short"], "too few")
    words["missing"] = "No such file"
    if os.getuid() != 0:  # who may read everything
        (tmp_path / "secret").chmod(0)
        words["secret"] = "Permission denied"
    for name, word in words.items():
        message = mistake("--data", tmp_path / name)
        assert str(tmp_path / name) in message and word in message
    assert "where 100000 are needed" in mistake("--data", corpus, "--batch-size", "100000")
    for bad in (tmp_path / "short", tmp_path / "short" / "sub", "/proc/checkpoints"):
        message = mistake("--data", corpus, *TINY, "--checkpoint-dir", bad)
        assert f"--checkpoint-dir {bad}: " in message


def test_an_error_is_one_line_without_usage_or_traceback_and_main_ends_with_its_code(tmp_path):
    code = "import train_graceful as tg; tg.main(lambda run: None); print('not reached')"
    for words, expected in (([], 0), (["--steps", "x"], 2), (["--help"], 0)):
        command = [sys.executable, "-c", code, "--checkpoint-dir", tmp_path, *words]
        result = forked(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == expected and "not reached" not in result.stdout
        lines = result.stderr.splitlines()
        assert [line[:7] for line in lines] == ["error: "] * (expected == 2)
    assert result.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", MODES)
def test_the_defaults_parse(mode):
    options = t.declared(t.OPTIONS)
    config = t.configuration(options, t.parse_options(options, MODES[mode], None), {}, None)
    assert config.steps > 0 and config.mode in MODES[mode]


# ---- a script of one's own: main(train, **options)

SEEN = []


def train_mine(run: t.Run) -> None:
    """Fits noise."""
    SEEN.append(run.options)
    run.data([torch.randn(4) for _ in range(8)])
    model = run.model(nn.Linear(4, run.options.width))
    optimizer = run.keep(optimizer=torch.optim.SGD(model.parameters(), run.options.speed))
    for batch in run.batches():
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


OWN = {
    "width": 3,
    "speed": 0.5,
    "deep": True,
    "note": "",
    "sizes": (1, 2),
    "flavour": t.option("mild", "how it tastes: 100 % of it", choices=("mild", "hot")),
    "verbose": t.option(False, "say more", fixed=False),
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
        SEEN.clear()
        assert session(*args, train=train_mine, **{**OWN, **changes}) == code, capfd.readouterr()
        output = capfd.readouterr()
        if code == 0:
            return vars(SEEN[0])
        assert output.err.startswith("error: ") and output.err.count("\n") == 1
        return output.err

    return session_of_mine


def test_help_groups_the_options_and_says_defaults_and_choices(capsys):
    common, own = run("--help").stdout.split("\nthis program:\n")
    for name in t.declared(t.OPTIONS):
        group = common if name in t.COMMON_OPTIONS else own
        assert f"\n  {t.flag(name)}" in f"\n{group}", name
    assert session("--help", train=train_mine, **OWN) == 0
    common, own = capsys.readouterr().out.split("\nthis program:\n")
    assert "Fits noise." in common
    assert "--batch-size BATCH_SIZE" in common and "(default 2)" in common
    own = " ".join(own.split())
    for words in (
        "--width WIDTH (default 3) --speed SPEED (default 0.5) --deep, --no-deep",
        "--flavour {mild,hot} how it tastes: 100 % of it (default mild)",
    ):
        assert words in own
    assert "--batch-size" not in own


def test_an_own_option_has_the_type_of_its_default(mine):
    values = {name: one.default if isinstance(one, t.option) else one for name, one in OWN.items()}
    values["checkpoint_dir"] = os.path.abspath("mine")
    assert mine(0).items() >= values.items()
    words = "--width 1000 --speed 1 --no-deep --sizes 4 5 6 --flavour=hot --verbose --limit 9"
    given = mine(0, *words.split(), "--note", "a b", "--checkpoint-dir", "other")
    values.update(width=1000, speed=1.0, deep=False, note="a b", sizes=(4, 5, 6), flavour="hot")
    values.update(verbose=True, limit=9, checkpoint_dir=os.path.abspath("other"))
    assert given.items() >= values.items()
    assert (type(given["width"]), type(given["speed"])) == (int, float)


def test_what_makes_a_run_stays_as_it_is_in_its_checkpoint(mine, tmp_path):
    """A change is named with both values, and a default that was edited since changes nothing."""
    mine(0, "--width", 5, "--sizes", 4, "--color", "blue", "--no-deep")
    resume = ("--resume", "latest", "--steps", 4)
    for name, new, old in (
        ("width", 6, 5),
        ("speed", 0.25, 0.5),
        ("note", "x", ""),
        ("flavour", "hot", "mild"),
        ("batch-size", 4, 2),
        ("limit", 3, None),
        ("seed", 7, 0),
    ):
        error = mine(2, *resume, f"--{name}", new)
        assert f"--{name} {new} does not fit the checkpoint, whose run has --{name} {old}" in error
    assert "--deep" in mine(2, *resume, "--deep")
    assert "--sizes" in mine(2, *resume, "--sizes", 4, 5)
    assert t.latest_checkpoint(tmp_path / "mine") == tmp_path / "mine" / "final.pt"
    edited = {"width": 7, "speed": 0.1, "color": "red", "another": 4}
    options = mine(0, *resume, **edited)
    made = {"width": 5, "speed": 0.5, "sizes": (4,), "deep": False}
    assert options.items() >= {**made, "color": "blue", "another": 4}.items()
    same = "--width 5 --no-deep --sizes 4 --verbose --color green".split()
    options = mine(0, "--resume", "latest", "--steps", 6, *same, another=4)
    assert options.items() >= {**made, "color": "green", "verbose": True}.items()


def test_a_checkpoint_of_another_program_is_told_by_its_options(mine, corpus, tmp_path):
    built_in = ["--data", corpus, *TINY, "--checkpoint-dir", tmp_path / "ck"]
    assert session(*built_in, "--steps", 1) == 0
    other = mine(2, "--resume", tmp_path / "ck" / "final.pt")
    said = "; --weights in the place of --resume begins a new run from its weights\n"
    assert "final.pt: here is no --" in other and other.endswith(said)
    mine(0)
    assert "here is no --" in refused("--resume", tmp_path / "mine" / "final.pt")


def test_a_script_may_say_from_where_it_resumes_and_how_long_it_runs(mine):
    assert mine(2, resume="latest").endswith("mine: no checkpoint there\n")
    error = mine(2, steps=None)
    assert error == "error: how long? Give --steps (or --epochs, but not of a stream)\n"
    assert mine(0, "--epochs", 1, steps=None, resume="auto")["epochs"] == 1


def test_a_value_that_no_checkpoint_can_hold_is_named(mine):
    error = mine(2, note=Path("x"))
    assert "['config']['note'] cannot be saved: it is a pathlib." in error
    assert "--speed nan is not" in mine(2, "--speed", "nan")


BAD = ["", "x", "-1", "nan", "inf", "1e400", "9" * 5000, "1.5", "0", "\ud800", "a\nb"]


@pytest.mark.parametrize("name", [*{**t.OPTIONS, **OWN, **t.COMMON_OPTIONS}])
def test_whatever_stands_behind_an_option_is_taken_or_one_line(name, tmp_path, monkeypatch, capfd):
    """The value that is taken is of the option's type."""
    monkeypatch.chdir(tmp_path)
    options, seen = {**t.OPTIONS, **OWN}, []
    for value in BAD:
        seen.clear()
        own = {"train": lambda run: seen.append(run.options), **options}
        code = session(f"{t.flag(name)}={value}", **own)
        errors = capfd.readouterr().err
        assert code == (0 if seen else 2), value
        if seen and name not in t.NOT_STORED:
            option = t.declared(options)[name]
            assert option.default is None or type(getattr(seen[0], name)) is type(option.default)
        elif code and name not in ("resume", "weights"):
            assert errors.startswith("error: ") and errors.count("\n") == 1
            assert len(errors) < 6000 and t.flag(name) in errors
    assert not list(tmp_path.iterdir())
