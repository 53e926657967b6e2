"""scripts/checkpoints.py list, show and sample: what is there, read and never touched."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MODES, ROOT, TINY, run

import train_graceful as t

TOOL = ROOT / "scripts" / "checkpoints.py"
spec = importlib.util.spec_from_file_location("checkpoints", TOOL)
checkpoints = importlib.util.module_from_spec(spec)
spec.loader.exec_module(checkpoints)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    """The checkpoint directory of a finished run; one of its files is damaged, one is another program's."""
    directory = tmp_path_factory.mktemp("looking") / "ck"
    result = run("--data", corpus, "--checkpoint-dir", directory, *TINY, *MODES["geometric"], "--steps", 12, "--save-every", 5, "--eval-every", 6)
    assert result.returncode == 0, result.stderr
    data = bytearray((directory / "step_10.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (directory / "step_10.pt").write_bytes(data)
    t.save_checkpoint({"a": torch.ones(3)}, directory / "mine.pt")
    torch.save(torch.nn.Linear(2, 2), directory / "model.pt")
    return directory


def untouched(directory) -> dict:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in directory.rglob("*")}


@pytest.fixture
def ask(trained, capsys):
    """ask(code, *args) is what the tool prints that ends with that exit code; it has changed nothing."""
    def asked(code: int, *args: object) -> str:
        before = untouched(trained)
        handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            assert checkpoints.main([*map(str, args)]) == code
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
        assert untouched(trained) == before
        output = capsys.readouterr()
        return output.out + output.err

    return asked


def test_list_names_every_checkpoint_and_its_run_the_newest_first_and_says_which_are_damaged(ask, trained, tmp_path):
    header, *rows = ask(0, "list", trained).splitlines()
    assert header.split() == ["step", "epoch", "loss", "best", "age", "size", "run", "reason", "checkpoint"]
    by_name = {Path(row.removesuffix(" <- latest").split()[-1]).name: row for row in rows}
    assert list(by_name) == [path.name for path in t.checkpoints_in(trained)] and len(rows) == 6
    state = t.load_checkpoint(trained / "final.pt")
    assert by_name["final.pt"].split()[0] == "12" and f" {state['run_id'][:6]}  completed " in by_name["final.pt"]
    assert " damaged " in by_name["step_10.pt"] and " of another program " in by_name["mine.pt"] and " damaged " in by_name["model.pt"]
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck" / "gone.pt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "ck" / "final.pt")
    _, *others = ask(0, "list", tmp_path / "ck").splitlines()
    assert [row.rsplit("/")[-1] for row in others] == ["final.pt", "gone.pt"] and all("no checkpoint " in row for row in others)


def test_list_marks_what_latest_takes(ask, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "ck")
    (tmp_path / "ck" / "mine.pt").unlink()
    os.utime(tmp_path / "ck" / "step_10.pt", (2**33, 2**33))  # damaged
    os.utime(tmp_path / "ck" / "step_5.pt", (2**32, 2**32))
    marked = [row for row in ask(0, "list", tmp_path / "ck").splitlines() if "<- latest" in row]
    assert len(marked) == 1 and "step_5.pt <- latest" in marked[0]
    assert t.latest_checkpoint(tmp_path / "ck", lambda skipped: None).name == "step_5.pt"


def test_show_prints_what_a_checkpoint_holds(ask, trained, tmp_path):
    text, state = ask(0, "show", trained / "final.pt"), t.load_checkpoint(trained / "final.pt")
    assert f"Step:        {state['step']} (epoch {state['epoch']}, batch" in text
    assert "Optimizers:  rotation, expert, embedding" in text and "--mode            geometric\n" in text
    weights = sum(weight.numel() for weight in state["model_state_dict"].values())
    assert f"Parameters:  {weights:,} in " in text
    assert re.search("--epochs +none  .default.\n", text) and f"Loss:        {state['metrics']['smooth_loss']:.4f} nats a byte" in text
    shutil.copytree(trained, tmp_path / "ck")
    (tmp_path / "ck" / "mine.pt").unlink()
    newest = t.latest_checkpoint(tmp_path / "ck")
    assert f"Checkpoint:  {newest}\n" in ask(0, "show", "--checkpoint-dir", tmp_path / "ck")


def test_sample_always_writes_the_same_text(ask, trained):
    texts = [ask(0, "sample", trained / name, "--prompt", "the quick ") for name in ("step_5.pt", "step_5.pt", "final.pt")]
    assert all(text.startswith("the quick ") and len(text.encode()) > checkpoints.SAMPLE_BYTES for text in texts)
    assert texts[0] == texts[1] != texts[2]


def test_it_samples_from_the_distribution_that_the_model_predicts(trained, capsys):
    """With hardly any temperature each byte is the most likely one after those before it."""
    checkpoints.sample(trained / "final.pt", "the quick ", torch.device("cpu"), length=5, temperature=1e-9)
    printed = capsys.readouterr().out
    state = t.load_checkpoint(trained / "final.pt")
    model = t.ByteLM(t.Config.from_options({}, state["config"])).eval()
    model.load_state_dict(state["model_state_dict"])
    written = list(b"the quick ")
    for _ in range(5):
        logits, _ = model(torch.tensor([written[-16:]]))
        written.append(int(logits[0, -1].argmax()))
    assert printed == checkpoints.printable(bytes(written).decode(errors="replace")) + "\n"


def test_a_terminal_without_symbols_gets_question_marks(trained):
    result = subprocess.run([sys.executable, TOOL, "sample", trained / "final.pt"], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0 and result.stderr == b"" and result.stdout


def test_a_strangers_text_does_nothing_to_the_terminal(ask, trained, tmp_path):
    state = t.load_checkpoint(trained / "final.pt")
    state["torch_version"] = state["exit_reason"] = "\x1b]0;owned\x07"
    t.save_checkpoint(state, tmp_path / "a.pt")
    assert "\x1b" not in ask(0, "list", tmp_path) + ask(0, "show", tmp_path / "a.pt") + ask(0, "sample", trained / "final.pt")


def test_a_full_disk_behind_the_output_is_one_line(trained):
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, TOOL, "list", trained], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (2, "error: standard output: No space left on device\n")


def test_a_reader_that_goes_away_is_no_traceback(trained):
    process = subprocess.Popen([sys.executable, TOOL, "sample", trained / "final.pt"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141
    process.stderr.close()


def test_mistakes(ask, trained, tmp_path):
    def message(*args) -> str:
        text = ask(2, *args)
        assert text.startswith("error: ") and text.count("\n") == 1, text
        return text

    assert "no checkpoints" in message("list", tmp_path)
    assert "is a directory of checkpoints; its newest is" in message("show", trained)
    assert "damaged checkpoint (record" in message("show", trained / "step_10.pt")
    assert "not a checkpoint of this program" in message("sample", trained / "mine.pt")
    assert "invalid choice: 'lost'" in message("lost")
    assert f"{trained / 'mine.pt'} is a file; show {trained / 'mine.pt'}" in message("list", trained / "mine.pt")
    assert "no checkpoint there" in message("sample", "--checkpoint-dir", tmp_path)
    for nowhere in (("sample", "--checkpoint-dir", tmp_path / "nowhere"), ("list", tmp_path / "nowhere")):
        assert message(*nowhere) == f"error: {tmp_path / 'nowhere'}: No such file or directory\n"
    assert message("show", "latst", "--checkpoint-dir", trained).endswith("No such file or directory; scripts/checkpoints.py list shows what there is\n")
    state = t.load_checkpoint(trained / "final.pt")
    for key, value in [("step", "12"), ("metrics", {}), ("exit_reason", None), ("config", {}), ("model_state_dict", {"a": 1}),
                       ("metrics", {"smooth_loss": 1.0, "seconds": float("inf")})]:
        t.save_checkpoint({**state, key: value}, tmp_path / "wrong.pt")
        assert "program" in message("show", tmp_path / "wrong.pt")
