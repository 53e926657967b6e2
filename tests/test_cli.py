"""Bad input: one line on stderr, exit code 2, nothing written or destroyed."""

import os

import pytest
import torch
from conftest import MODES, TINY, refused, run

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


@pytest.mark.parametrize("arguments, words", [
    (["--steps", "0"], ["--steps", "0", "must be 1 or more"]),
    (["--steps", "1.5"], ["--steps", "invalid int value: '1.5'"]),
    (["--steps", "inf"], ["--steps", "inf"]),
    (["--steps", "-5"], ["--steps", "-5"]),
    (["--steps", "many"], ["--steps", "many"]),
    (["--batch-size", "0"], ["--batch-size"]),
    (["--grad-accum", "0"], ["--grad-accum"]),
    (["--dropout", "1"], ["--dropout", "must be below 1"]),
    (["--lr", "nan"], ["--lr", "invalid float value: 'nan'"]),
    (["--lr", "0"], ["--lr"]),
    (["--seed", "-1"], ["--seed"]),
    (["--keep", "0"], ["--keep"]),
    (["--workers", "-1"], ["--workers"]),
    (["--mode", "spherical"], ["--mode", "spherical"]),
    (["--mode", "geometric", "--loop", "standard"], ["--mode geometric", "--loop"]),
    (["--dim", "10", "--heads", "4"], ["--dim 10", "--heads 4"]),
    (["--experts", "1000", "--dim", "16"], ["--experts 1000"]),
    (["--mode", "geometric", "--dim", "1", "--heads", "1"], ["--mode geometric", "--dim"]),
    (["--no-such-option"], ["--no-such-option"]),
    (["--device", "tpu"], ["--device", "tpu"]),
    (["--data", ""], ["--data", "empty path"]),
    (["--checkpoint-dir", ""], ["--checkpoint-dir", "empty path"]),
    (["--resume", ""], ["--resume", "empty path"]),
    (["--lr", "inf"], ["--lr", "inf", "below"]),
    (["--steps", "9" * 20], ["--steps", "below"]),
    (["--dim", "100000000", "--heads", "1"], ["no memory"]),
    (["--context", "100000000"], ["standard library", "too few"]),
])
def test_a_bad_option_is_named(mistake, arguments, words):
    message = mistake(*arguments)
    assert all(word in message for word in words)


@pytest.mark.skipif(t.torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_named(mistake):
    assert "--device cuda: there is none here" in mistake("--device", "cuda")


def test_bad_data_is_named(mistake, tmp_path, corpus):
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_text("too short to train on")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name, word in {"missing": "No such file", "empty": "too few", "short": "too few", "folder": "empty folder", "fifo": "not a file"}.items():
        message = mistake("--data", tmp_path / name)
        assert str(tmp_path / name) in message and word in message
    assert "too few" in mistake("--data", corpus, "--batch-size", "100000")


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
        assert f"--checkpoint-dir {bad}: " in message and "File exists" not in message


def test_too_little_space_is_one_clear_line(mistake, tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(t.shutil, "disk_usage", lambda path: t.shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(t.UserError, match="0.00 MB free, checkpoints need"):
        t.train(t.parse_options(["--data", str(corpus), *TINY, "--checkpoint-dir", str(tmp_path / "ck"), "--no-keyboard"]))


def test_overriding_what_makes_the_run_names_the_option_and_both_values(corpus, tmp_path):
    directory = tmp_path / "ck"
    assert run("--data", corpus, *TINY, "--checkpoint-dir", directory, "--steps", "2").returncode == 0
    other = tmp_path / "other.txt"
    other.write_text("quite different " * 1000)
    resume = ("--resume", "latest", "--checkpoint-dir", directory, "--steps", "3")
    for option, new, old in (("--dim", "32", "16"), ("--seed", "7", "0"), ("--batch-size", "8", "4"), ("--mode", "geometric", "standard")):
        message = refused(*resume, option, new)
        assert f"{option} {new}" in message and f"{option} {old}" in message
    assert f"--data {other}" in refused(*resume, "--data", other)
    moved = tmp_path / "moved.txt"
    moved.write_bytes(corpus.read_bytes())
    assert run(*resume, "--data", moved, "--dim", "16").returncode == 0  # the same data elsewhere, the same width


def test_an_error_is_one_line_without_usage_or_traceback_and_exit_code_2(tmp_path):
    result = run("--steps", "x", cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", MODES)
def test_the_defaults_parse(mode):
    config = t.Config.from_options({key: value for key, value in t.parse_options(MODES[mode]).items() if key not in ("resume", "no_keyboard")})
    assert config.steps > 0 and config.loop == ("standard" if mode == "standard" else "controller")


def test_many_processes_leave_an_apple_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    assert t.choose_device("auto").type == t.choose_device("mps").type == "mps"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    assert t.choose_device("auto").type == "cpu"
    with pytest.raises(t.UserError, match="--device mps: torchrun's processes cannot"):
        t.choose_device("mps")


@pytest.mark.parametrize("typed, meant", [("--batch-siez", "--batch-size"), ("--resme=x", "--resume"), ("--chekpoint-dir", "--checkpoint-dir")])
def test_an_option_that_is_nearly_one_is_answered_with_it(typed, meant):
    assert refused(typed).endswith(f"(did you mean {meant}?)")


def test_a_checkpoint_that_is_not_there_is_answered_with_how_to_find_those_that_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = "No such file or directory; scripts/checkpoints.py list shows what there is"
    assert refused("--resume", "ck/final.pt", "--checkpoint-dir", "ck").endswith(f"ck/final.pt: {message}")
    assert refused("--resume", "lates").endswith(f"lates: {message}")
    t.save_checkpoint({"a": 1}, tmp_path / "ck" / "step_4.pt")
    assert refused("--resume", "ck").endswith("is a directory of checkpoints; its newest is ck/step_4.pt")


def test_a_whole_number_may_be_written_with_an_exponent():
    options = t.parse_options(["--steps", "1e4", "--batch-size=2e0", "--lr", "1e-3"])
    assert (options["steps"], options["batch_size"], options["lr"]) == (10_000, 2, 0.001) and type(options["steps"]) is int


def test_help_groups_the_options():
    text = run("--help").stdout
    options = [f"--{field.name.replace('_', '-')}" for field in t.dataclasses.fields(t.Config)]
    for words in [*t.OPTION_GROUPS.values(), "going on"]:
        assert f"\n{words}:\n" in text
    assert all(f"\n  {option}" in text for option in [*options, "--resume", "--no-keyboard"])


@pytest.mark.skipif(t.importlib.util.find_spec("tensorboard") is not None, reason="tensorboard is installed")
def test_tensorboard_without_its_package_is_answered_with_the_command(mistake, corpus):
    assert mistake("--tensorboard", "--data", str(corpus), *TINY) == "--tensorboard needs the package tensorboard: pip install tensorboard"
