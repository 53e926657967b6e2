"""Bad input: one line on stderr, exit code 2, nothing written or destroyed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import MODES, ROOT, TINY, forked, refused, run, session
from torch import nn
from torch.nn import functional as F

import train_graceful as t


@pytest.fixture
def mistake(tmp_path, monkeypatch):
    """mistake(*args) runs the command line in this process and returns the message; it must not have written anything."""
    monkeypatch.chdir(tmp_path)

    def check(*args) -> str:
        before = sorted(tmp_path.rglob("*"))
        message = refused(*args)
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return check


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--steps", "0"], ["--steps", "0", "is not 1 or more"]),
        (["--steps", "1.5"], ["--steps", "invalid int value: '1.5'"]),
        (["--steps", "inf"], ["--steps", "inf"]),
        (["--steps", "-5"], ["--steps", "-5"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--batch-size", "0"], ["--batch-size"]),
        (["--grad-accum", "0"], ["--grad-accum"]),
        (["--dropout", "1"], ["--dropout", "is not 0 or more and below 1"]),
        (["--lr", "nan"], ["--lr", "nan is not"]),
        (["--lr", "0"], ["--lr"]),
        (["--seed", "-1"], ["--seed"]),
        (["--keep", "0"], ["--keep"]),
        (["--workers", "-1"], ["--workers"]),
        (["--mode", "spherical"], ["--mode", "spherical", "geometric"]),
        (["--mode", "geometric", "--loop", "standard"], ["--mode geometric", "--loop"]),
        (["--dim", "10", "--heads", "4"], ["--heads has to divide --dim"]),
        (["--experts", "1000", "--dim", "16"], ["--experts be at most 4 times --dim"]),
        (["--mode", "geometric", "--dim", "1", "--heads", "1"], ["--heads has to divide --dim"]),
        (["--no-such-option"], ["--no-such-option"]),
        (["--device", "tpu"], ["--device", "tpu"]),
        (["--resume", ""], ["a directory", "not a checkpoint"]),
        (["--lr", "inf"], ["--lr", "inf", "below"]),
        (["--steps", "9" * 20], ["--steps", "below"]),
        (["--steps", "9" * 5000], ["--steps"]),
        (["--steps", "1e400"], ["--steps"]),
        (["--steps"], ["--steps", "expected one argument"]),
        (["--compile=1"], ["--compile"]),
        (["train"], ["train"]),
        (["--context", "100000000"], ["--data", "too few"]),
    ],
)
def test_a_bad_option_is_named(mistake, arguments, words):
    message = mistake(*arguments)
    assert all(word in message for word in words)


@pytest.mark.skipif(t.torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_named(mistake):
    assert "--device cuda: here it can be" in mistake("--device", "cuda")


def test_bad_data_is_named(mistake, tmp_path, corpus):
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_text("too short to train on")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    words = dict.fromkeys(["empty", "folder", "fifo", "short"], "too few")
    words["missing"] = "No such file"
    for name, word in words.items():
        message = mistake("--data", tmp_path / name)
        assert str(tmp_path / name) in message and word in message
    assert "where 100000 are needed" in mistake("--data", corpus, "--batch-size", "100000")


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_unreadable_data_is_named(mistake, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x" * 100_000)
    secret.chmod(0)
    assert f"{secret}: Permission denied" in mistake("--data", secret)


def test_a_checkpoint_directory_that_cannot_be_written_is_named(mistake, tmp_path, corpus):
    (tmp_path / "file").touch()
    for bad in (tmp_path / "file", tmp_path / "file" / "sub", "/proc/checkpoints"):
        message = mistake("--data", corpus, *TINY, "--checkpoint-dir", bad)
        assert f"--checkpoint-dir {bad}: " in message


def test_overriding_what_makes_the_run_names_the_option_and_both_values(corpus, tmp_path):
    directory = tmp_path / "ck"
    assert session("--data", corpus, *TINY, "--checkpoint-dir", directory, "--steps", "2") == 0
    other = tmp_path / "other.txt"
    other.write_text("quite different " * 1000)
    resume = ("--resume", "latest", "--checkpoint-dir", directory, "--steps", "3")
    for option, new, old in (
        ("--dim", "32", "16"),
        ("--seed", "7", "0"),
        ("--batch-size", "8", "4"),
        ("--mode", "geometric", "standard"),
    ):
        message = refused(*resume, option, new)
        assert f"{option} {new}" in message and f"{option} {old}" in message
    assert "the data is not what the run of" in refused(*resume, "--data", other)
    moved = tmp_path / "moved.txt"
    moved.write_bytes(corpus.read_bytes())
    assert (
        session(*resume, "--data", moved, "--dim", "16") == 0
    )  # the same data elsewhere, the same width


def test_an_error_is_one_line_without_usage_or_traceback_and_exit_code_2(tmp_path):
    result = run("--steps", "x", cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", MODES)
def test_the_defaults_parse(mode):
    options = t.declared(t.OPTIONS)
    config = t.configuration(options, t.parse_options(options, MODES[mode], None), {}, None)
    assert config.steps > 0 and config.mode in MODES[mode]


def test_many_processes_leave_an_apple_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert t.choose_device("auto").type == t.choose_device("mps").type == "mps"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    assert t.choose_device("auto").type == "cpu"
    with pytest.raises(t.UserError, match="--device mps: here it can be cpu"):
        t.choose_device("mps")


def test_help_groups_the_options():
    common, own = run("--help").stdout.split("\nthis program:\n")
    for name in t.declared(t.OPTIONS):
        group = common if name in t.COMMON_OPTIONS else own
        assert f"\n  {t.flag(name)}" in f"\n{group}", name


# A person's own script: main(train, **options).


class Noise(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.randn(4)


SEEN = []


def train_noise(run: t.Run) -> None:
    """Fits noise."""
    SEEN.append(run.options)
    run.data(Noise())
    model = run.model(nn.Linear(4, run.options.width))
    optimizer = run.keep(optimizer=torch.optim.SGD(model.parameters(), run.options.speed))
    for batch in run.batches():
        loss = F.mse_loss(model(batch).mean(1), batch.mean(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss)


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
    """mine(code, *args) is a session of the own script in tmp_path that ends with that exit code: its options, or its one line."""
    monkeypatch.chdir(tmp_path)

    def session_of_mine(code: int, *args, **changes):
        SEEN.clear()
        assert session(*args, train=train_noise, **{**OWN, **changes}) == code, capfd.readouterr()
        output = capfd.readouterr()
        if code == 0:
            return SEEN[0]
        assert output.err.startswith("error: ") and output.err.count("\n") == 1
        return output.err

    return session_of_mine


def test_own_options_are_in_help_with_their_defaults_and_choices(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(
        "import train_graceful as tg\ndef train(run):\n    'Trains something of mine.'\n"
        "tg.main(train, width=3, speed=0.5, deep=True, flavour=tg.option('mild', 'how it tastes: 100 %', choices=('mild', 'hot')), batch_size=7)"
    )
    result = forked([sys.executable, script, "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    common, own = result.stdout.split("\nthis program:\n")
    assert "Trains something of mine." in common and "mine.py" in common
    for words in (
        "--width WIDTH",
        "(default 3)",
        "--speed SPEED",
        "(default 0.5)",
        "--deep, --no-deep",
        "--flavour {mild,hot}",
        "how it tastes: 100 %",
        "(default mild)",
    ):
        assert words in own
    assert (
        "--batch-size BATCH_SIZE" in common
        and "(default 7)" in common
        and "--batch-size" not in own
    )


def test_an_own_option_has_the_type_of_its_default(mine):
    defaults = mine(0)
    plain = {name: value for name, value in OWN.items() if not isinstance(value, t.option)}
    assert vars(defaults).items() >= {**plain, "checkpoint_dir": os.path.abspath("mine")}.items()
    assert (defaults.flavour, defaults.verbose, defaults.color, defaults.limit) == (
        "mild",
        False,
        "red",
        None,
    )
    given = mine(
        0,
        "--width",
        "1000",
        "--speed",
        "1",
        "--no-deep",
        "--note",
        "a b",
        "--sizes",
        "4",
        "5",
        "6",
        "--flavour=hot",
        "--verbose",
        "--limit",
        "9",
        "--checkpoint-dir",
        "other",
    )
    assert (given.width, given.speed, given.deep, given.note, given.sizes) == (
        1000,
        1.0,
        False,
        "a b",
        (4, 5, 6),
    )
    assert (type(given.width), type(given.speed)) == (int, float)
    assert (given.flavour, given.verbose, given.limit) == (
        "hot",
        True,
        9,
    ) and given.checkpoint_dir == os.path.abspath("other")


def test_a_script_may_say_from_where_it_resumes(mine, tmp_path):
    assert mine(2, resume="latest").endswith("mine: no checkpoint there\n")
    assert mine(0, resume="auto").width == OWN["width"]


def test_a_default_that_no_checkpoint_can_hold_is_named_after_the_first_batch(mine):
    error = mine(2, note=Path("x"))
    assert "['config']['note'] cannot be saved: it is a pathlib." in error


def test_a_number_that_is_none_is_named(mine):
    assert "--speed nan is not" in mine(2, "--speed", "nan")
    assert "expected one argument" in mine(2, "--width")
    assert "unrecognized arguments: 7" in mine(2, "--width", 3, 7)


def test_what_makes_an_own_run_is_kept_in_its_checkpoint_and_cannot_be_changed(mine, tmp_path):
    mine(0, "--width", 5, "--sizes", 4, "--color", "blue", "--no-deep")
    resume = ("--resume", "latest", "--steps", 4)
    for name, new, old in (
        ("width", 6, 5),
        ("speed", 0.25, 0.5),
        ("note", "x", ""),
        ("flavour", "hot", "mild"),
        ("batch-size", 4, 2),
        ("limit", 3, None),
    ):
        assert f"--{name} {new} does not fit the checkpoint, whose run has --{name} {old}" in mine(
            2, *resume, f"--{name}", new
        )
    assert "--deep" in mine(2, *resume, "--deep") and "--sizes" in mine(2, *resume, "--sizes", 4, 5)
    assert t.latest_checkpoint(tmp_path / "mine") == tmp_path / "mine" / "final.pt"
    same = mine(
        0, *resume, "--width", "5", "--no-deep", "--sizes", 4, "--verbose", "--color", "green"
    )
    assert (same.width, same.sizes, same.deep, same.verbose, same.color) == (
        5,
        (4,),
        False,
        True,
        "green",
    )


def test_a_default_that_has_been_edited_since_changes_no_run_that_has_begun(mine):
    mine(0)
    options = mine(0, "--resume", "latest", "--steps", 4, width=7, speed=0.1, color="blue")
    assert (options.width, options.speed, options.color) == (3, 0.5, "red")
    assert mine(0, "--resume", "latest", "--steps", 6, another=4).another == 4, (
        "one that was added has its default"
    )


def test_a_checkpoint_of_another_program_is_told_by_its_options(mine, corpus, tmp_path):
    assert session("--data", corpus, *TINY, "--checkpoint-dir", tmp_path / "ck", "--steps", 1) == 0
    other = mine(2, "--resume", tmp_path / "ck" / "final.pt")
    assert "final.pt: here is no --" in other and other.endswith(
        "; --weights in the place of --resume begins a new run from its weights\n"
    )
    mine(0)
    assert "here is no --" in refused("--resume", tmp_path / "mine" / "final.pt")


BAD = ["", "x", "-1", "nan", "inf", "1e400", "9" * 5000, "1.5", "0", "\ud800", "a\nb"]


@pytest.mark.parametrize("name", [*{**t.OPTIONS, **OWN, **t.COMMON_OPTIONS}])
def test_whatever_stands_behind_an_option_is_taken_or_one_line(name, tmp_path, monkeypatch, capfd):
    """The value that is taken is of the option's type."""
    monkeypatch.chdir(tmp_path)
    options, seen = {**t.OPTIONS, **OWN}, []
    for value in BAD:
        seen.clear()
        code = session(
            f"{t.flag(name)}={value}", train=lambda run: seen.append(run.options), **options
        )
        errors = capfd.readouterr().err
        assert code == (0 if seen else 2), value
        if seen and name not in t.NOT_STORED:
            option = t.declared(options)[name]
            taken = getattr(seen[0], name)
            assert type(taken) is type(option.default) or option.default is None, value
        elif code:
            assert (
                errors.startswith("error: ")
                and errors.count("\n") == 1
                and len(errors) < 6000
                and t.flag(name) in errors
                or name in ("resume", "weights")
            )
    assert not list(tmp_path.iterdir())


def test_a_run_without_an_end_says_what_to_give(mine):
    assert (
        mine(2, steps=None) == "error: how long? Give --steps (or --epochs, but not of a stream)\n"
    )
    assert mine(0, "--epochs", 1, steps=None).epochs == 1


def test_main_ends_the_process_with_the_exit_code():
    code = "import train_graceful as tg; tg.main(lambda run: None); print('not reached')"
    for arguments, expected in (((), 0), (("--steps", "x"), 2), (("--help",), 0)):
        result = forked(
            [sys.executable, "-c", code, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert (
            result.returncode == expected
            and "not reached" not in result.stdout
            and "Traceback" not in result.stderr
        )
