"""--list, --show and --sample: what is there, read and never touched."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MODES, SCRIPT, TINY, run

import train_graceful as t


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    """The checkpoint directory of a finished run; one of its files is damaged, one is another program's."""
    directory = tmp_path_factory.mktemp("looking") / "ck"
    result = run("--data", corpus, "--checkpoint-dir", directory, *TINY, *MODES["geometric"], "--steps", 12, "--save-every", 5, "--eval-every", 6)
    assert result.returncode == 0, result.stderr
    t.convert_checkpoint(directory / "step_5.pt", directory / "parts")
    data = bytearray((directory / "step_10.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (directory / "step_10.pt").write_bytes(data)
    t.save_checkpoint({"a": torch.ones(3)}, directory / "mine.pt")
    torch.save(torch.nn.Linear(2, 2), directory / "model.pt")
    return directory


def untouched(directory) -> dict:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in directory.rglob("*")}


@pytest.fixture
def ask(fork, trained):
    """ask(code, *args) is what the program prints that ends with that exit code; it has changed nothing."""
    def asked(code: int, *args: object) -> str:
        before = untouched(trained)
        child = fork(*args)
        text = child.finish().replace("\r\n", "\n")
        assert child.exitcode == code and "Traceback" not in text and untouched(trained) == before, text
        return text

    return asked


def test_list_names_every_checkpoint_the_newest_first_and_says_which_are_damaged(ask, trained, tmp_path):
    header, *rows = ask(0, "--list", trained).splitlines()
    assert header.split() == ["step", "epoch", "loss", "best", "age", "size", "reason", "checkpoint"]
    by_name = {Path(row.split()[-1]).name: row for row in rows}
    assert list(by_name) == [path.name for path in t.checkpoints_in(trained)] and len(rows) == 7
    assert by_name["final.pt"].split()[0] == "12" and " completed " in by_name["final.pt"]
    assert by_name["parts"].split()[0] == "5" and " periodic " in by_name["parts"]
    (tmp_path / "ck" / "half").mkdir(parents=True)
    shutil.copy(trained / "parts" / ".metadata", tmp_path / "ck" / "half")
    (tmp_path / "ck" / "gone.pt").symlink_to("nowhere")
    (tmp_path / "ck" / "step_3").mkdir()
    os.mkfifo(tmp_path / "ck" / "final.pt")
    _, half, *others = ask(0, "--list", tmp_path / "ck").splitlines()
    assert " of another program " in half and [row.rsplit("/")[-1] for row in others] == ["final.pt", "gone.pt", "step_3"]
    assert all("no checkpoint " in row for row in others)
    assert " damaged " in by_name["step_10.pt"] and all(" of another program " in by_name[name] for name in ("mine.pt", "model.pt"))


def test_show_prints_what_a_checkpoint_holds(ask, trained, tmp_path):
    for name in ("final.pt", "parts"):
        text, state = ask(0, "--show", trained / name), t.load_checkpoint(trained / name)
        assert f"Step:        {state['step']} (epoch {state['epoch']}, batch" in text
        assert "Optimizers:  rotation, expert, embedding" in text and "--mode            geometric\n" in text
        weights = sum(weight.numel() for weight in state["model_state_dict"].values())
        assert f"Parameters:  {weights:,} in " in text
        assert re.search("--epochs +none  .default.\n", text) and f"Loss:        {state['metrics']['smooth_loss']:.4f} nats a byte" in text
    shutil.copytree(trained, tmp_path / "ck")
    (tmp_path / "ck" / "mine.pt").unlink()
    newest = t.latest_checkpoint(tmp_path / "ck")
    assert f"Checkpoint:  {newest}\n" in ask(0, "--show", "latest", "--checkpoint-dir", tmp_path / "ck")


def test_sample_writes_the_same_text_from_a_file_and_from_parts(ask, trained):
    texts = [ask(0, "--sample", trained / name, "--prompt", "the quick ") for name in ("step_5.pt", "parts", "step_5.pt", "final.pt")]
    assert all(text.startswith("the quick ") and len(text.encode()) > t.SAMPLE_BYTES for text in texts)
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_it_samples_from_the_distribution_that_the_model_predicts(trained, capsys):
    """With hardly any temperature each byte is the most likely one after those before it."""
    t.sample(trained / "final.pt", "the quick ", torch.device("cpu"), length=5, temperature=1e-9)
    printed = capsys.readouterr().out
    state = t.load_checkpoint(trained / "final.pt")
    model = t.ByteLM(t.Config.from_options({}, state["config"])).eval()
    model.load_state_dict(state["model_state_dict"])
    written = list(b"the quick ")
    for _ in range(5):
        logits, _ = model(torch.tensor([written[-16:]]))
        written.append(int(logits[0, -1].argmax()))
    assert printed == t.printable(bytes(written).decode(errors="replace")) + "\n"


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}])
def test_a_terminal_without_symbols_gets_question_marks(trained, environment):
    result = run("--sample", trained / "final.pt", env={**os.environ, **environment})
    assert result.returncode == 0 and result.stderr == ""


def test_a_strangers_text_does_nothing_to_the_terminal(ask, trained, tmp_path):
    state = t.load_checkpoint(trained / "final.pt")
    state["torch_version"] = state["exit_reason"] = "\x1b]0;owned\x07"
    t.save_checkpoint(state, tmp_path / "a.pt")
    assert "\x1b" not in ask(0, "--list", tmp_path) and "\x1b" not in ask(0, "--show", tmp_path / "a.pt") and "\x1b" not in ask(0, "--sample", trained / "final.pt")


@pytest.mark.parametrize("option", ["--list", "--show", "--sample"])
def test_a_full_disk_behind_the_output_is_one_line(trained, option):
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, str(SCRIPT), option, str(trained if option == "--list" else trained / "final.pt")],
                                stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (2, "error: standard output: No space left on device\n")


def test_a_reader_that_goes_away_is_no_traceback(trained):
    process = subprocess.Popen([sys.executable, str(SCRIPT), "--sample", str(trained / "final.pt")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141
    process.stderr.close()


def test_mistakes(ask, trained, tmp_path):
    def message(*args) -> str:
        text = ask(2, *args)
        assert text.startswith("error: ") and text.count("\n") == 1, text
        return text

    assert "no checkpoints" in message("--list", tmp_path)
    assert "is a directory of checkpoints; its newest is" in message("--show", trained)
    assert "damaged checkpoint (record" in message("--show", trained / "step_10.pt")
    assert "not a checkpoint of this program" in message("--sample", trained / "mine.pt")
    assert "--list and --show: one at a time" in message("--list", "--show", "latest")
    assert "--prompt is for --sample" in message("--prompt", "x")
    assert "--steps does not go with --sample" in message("--sample", "latest", "--steps", 5)
    assert f"{trained / 'mine.pt'} is a file; --show {trained / 'mine.pt'}" in message("--list", trained / "mine.pt")
    assert "no checkpoint there" in message("--sample", "latest", "--checkpoint-dir", tmp_path)
    for nowhere in (("--sample", "latest", "--checkpoint-dir", tmp_path / "nowhere"), ("--list", tmp_path / "nowhere")):
        assert message(*nowhere) == f"error: {tmp_path / 'nowhere'}: No such file or directory\n"
    assert message("--show", "latst", "--checkpoint-dir", trained).endswith("No such file or directory; did you mean latest?\n")
    state = t.load_checkpoint(trained / "final.pt")
    for key, value in [("step", "12"), ("metrics", {}), ("exit_reason", None), ("config", {}), ("model_state_dict", {"a": 1}),
                       ("metrics", {"smooth_loss": 1.0, "seconds": float("inf")})]:
        t.save_checkpoint({**state, key: value}, tmp_path / "wrong.pt")
        assert "program" in message("--show", tmp_path / "wrong.pt")
