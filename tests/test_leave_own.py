"""Leaving a training of one's own: every request and exit code, in forks with a terminal each."""

import os
import re
import signal
import sys
import time

import pexpect
import pytest
from helpers import (
    ENDLESS,
    ROOT,
    SCRIPT,
    end_groups,
    finish,
    on_a_terminal,
    processes_in_session,
    saved_path,
    wait_until,
)
from pexpect.fdpexpect import fdspawn

from train_graceful import load_checkpoint

SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"]

# What a test does in it goes to the places in capitals.
OWN = """
import os, threading, time, torch, train_graceful as tg

LOADED = []

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4_000_000
    def __getitem__(self, index):
        LOADED.append(index)
        SAMPLE
        return torch.ones(1)

def rest():
    print("@resting", flush=True)
    threading.Event().wait()

def train(run):
    BEFORE
    run.data(Data(), torch.ones(4, 1))
    model = run.model(torch.nn.Linear(1, 1))
    optimizer = run.keep(optimizer=torch.optim.SGD(model.parameters(), 0.01))
    def evaluate(batch):
        return {"accuracy": torch.full((len(batch),), VALUE)}
    for batch in run.batches(EVALUATE):
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        BODY
        optimizer.step()
        run.log(loss=loss)
    AFTER

tg.main(train, steps=10**6, batch_size=4, save_every=10**6)
"""
PLACES = ("SAMPLE", "BEFORE", "VALUE", "EVALUATE", "BODY", "AFTER")


def forked(code: str, argv: list[str]) -> fdspawn:
    """A fork of this process, which has imported torch, in a session and on a terminal of its own."""
    # On 80 columns the validation result gives way to more than a day that is left.
    pid, terminal = on_a_terminal(["mine.py", *argv], compile(code, "mine.py", "exec"), columns=120)
    child = fdspawn(terminal, encoding="utf-8", timeout=30)
    child.pid = pid
    return child


@pytest.fixture
def own(tmp_path):
    """own(*argv, BODY="...") starts OWN with the places filled in; it saves in ck."""
    started = []

    def start(*argv: object, **places: str) -> fdspawn:
        code = OWN
        for place in PLACES:
            nothing = "" if place == "EVALUATE" else "0.0"
            code = code.replace(place, places.get(place, nothing))
        started.append(forked(code, ["--checkpoint-dir", str(tmp_path / "ck"), *map(str, argv)]))
        return started[-1]

    yield start
    end_groups(started)


def ended(child: fdspawn) -> int:
    """The exit code, once it has ended; child.before is what it printed last."""
    child.expect(pexpect.EOF)
    return os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])


def shown(output: str) -> list[str]:
    """The lines that stand on the screen, without those that were redrawn."""
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in output.split("\n")]
    return [line for line in lines if line]


def assert_says_where_it_is(output: str, checkpoint: dict, best="Best Loss: none yet") -> None:
    """From the save on, exactly the lines of the contract."""
    lines, path = shown(output), saved_path(output)
    assert lines[lines.index("📝 Saving emergency checkpoint...") : -1] == [
        "📝 Saving emergency checkpoint...",
        f"✅ Emergency checkpoint saved: {path}",
        "✨ Graceful exit completed!",
        "📊 Training Summary:",
        f"   Completed Steps: {checkpoint['step']}",
        "   Epoch: 0",
        f"   {best}",
        f"   Emergency checkpoint: {path}",
    ]
    assert re.fullmatch(rf"▶️ Resume with: .+\.py --resume {path}", lines[-1])


def test_the_last_validation_stands_beside_the_best_one_whatever_its_name(own):
    evaluation = {"EVALUATE": 'evaluate, best="max accuracy"', "VALUE": "0.75 - 0.01 * run.step"}
    child = own(
        "--eval-every", 1, **evaluation, BODY="time.sleep(0.2)\n        if run.step == 3: rest()"
    )
    child.expect("@resting")
    assert re.search(r"val accuracy 0\.7300 \(best 0\.7400\)", child.before)


def test_the_summary_names_the_best_value(own):
    evaluation = {"EVALUATE": 'evaluate, best="max accuracy"', "VALUE": "0.75"}
    child = own("--eval-every", 1, **evaluation, BODY="time.sleep(0.1)")
    child.expect("val accuracy 0.7500 \\(best 0.7500\\)")
    child.send("q\n")
    assert ended(child) == 0
    checkpoint = load_checkpoint(saved_path(child.before))
    assert_says_where_it_is(child.before, checkpoint, "Best Accuracy: 0.7500")


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_saves_and_sets_the_exit_code(own, name):
    child = own()
    child.expect("step [0-9]+/")
    os.kill(child.pid, signal.Signals[name])
    child.expect("🛑 Exit requested! Finishing current batch gracefully...")
    assert ended(child) == 128 + signal.Signals[name]
    checkpoint = load_checkpoint(saved_path(child.before))
    assert checkpoint["exit_reason"] == f"signal_{name}"
    assert_says_where_it_is(child.before, checkpoint)


def test_a_ctrl_c_that_a_wrapper_delivers_twice_saves(spawn, options):
    """Coreutils' timeout passes on what its child, in the same terminal, has heard already."""
    child = spawn(command=["timeout", "100", sys.executable, str(SCRIPT), *options, *ENDLESS])
    child.expect("step [0-9]+/")
    child.sendintr()
    output = finish(child)
    assert output.count("Exit requested") == 1 and "Second" not in output
    assert load_checkpoint(saved_path(output))["exit_reason"] == "signal_SIGINT"


def test_two_sigint_within_half_a_second_are_one(own, tmp_path):
    go = tmp_path / "go"
    child = own(BODY=f"while run.step == 3 and not os.path.exists({str(go)!r}): pass")
    child.expect("Training started")
    os.kill(child.pid, signal.SIGINT)
    child.expect("Exit requested!")
    os.kill(child.pid, signal.SIGINT)
    go.touch()
    assert ended(child) == 130 and "Second" not in child.before
    assert load_checkpoint(saved_path(child.before))["exit_reason"] == "signal_SIGINT"


def test_ctrl_c_after_q_is_not_yet_the_second_one(own, tmp_path):
    body = "run.step == 3 and print('@there', flush=True)\n"
    body += "        while run.step == 3 and len(run.monitor.heard) < 2: pass\n"
    child = own(BODY=body + "        if run.step == 3: rest()")
    child.expect("@there")
    child.send("q\n")
    child.expect("Exit requested!")
    os.kill(child.pid, signal.SIGINT)
    child.expect("@resting")
    heard = time.monotonic()
    # Within half a second it would be the same one.
    wait_until(lambda: time.monotonic() - heard > 0.6)
    os.kill(child.pid, signal.SIGINT)
    child.expect("Second Ctrl-C: leaving without saving. Earlier checkpoints are whole.")
    assert ended(child) == 130
    assert not list((tmp_path / "ck").rglob("*.pt"))


def test_of_several_requests_the_first_one_counts(own):
    body = "run.step == 3 and print('@there', flush=True)\n"
    child = own(BODY=body + "        while run.step == 3 and len(run.monitor.heard) < 3: pass")
    child.expect("@there")
    child.send("q\n")
    child.expect("Exit requested!")
    os.kill(child.pid, signal.SIGTERM)
    os.kill(child.pid, signal.SIGUSR1)
    assert ended(child) == 0
    assert "Exit requested!" not in child.before and child.before.count("Saving emergency") == 1
    reason = load_checkpoint(saved_path(child.before))["exit_reason"]
    assert reason == "user_requested_graceful_exit"


@pytest.mark.parametrize("another_place", [True, False])
def test_after_a_signal_a_failed_save_goes_to_the_temporary_directory(
    own, monkeypatch, tmp_path, another_place
):
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck" / "emergency_exit").write_text("a file where the directory should be")
    (tmp_path / "elsewhere").mkdir()
    # Ours, to ask where that is, and the fork's.
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "elsewhere"))
    child = own("--save-every", 5, BEFORE="import tempfile; tempfile.gettempdir()")
    child.expect("step [1-9][0-9]+/")
    if not another_place:
        (tmp_path / "elsewhere").rename(tmp_path / "gone")
        (tmp_path / "elsewhere").write_text("in the way")
    os.kill(child.pid, signal.SIGTERM)
    code = ended(child)
    assert "Emergency checkpoint not saved: " in child.before
    if another_place:
        path = saved_path(child.before)
        state = load_checkpoint(path)
        assert code == 143 and state["exit_reason"] == "signal_SIGTERM"
        name = f"train_graceful_{state['run_id']}_emergency_step_{state['step']}.pt"
        assert path == tmp_path / "elsewhere" / name
        assert shown(child.before)[-2] == f"   Emergency checkpoint: {path}"
        assert "Graceful exit completed" in child.before
    else:
        assert code == 1 and "Graceful exit completed" not in child.before
        newest = re.search(r"Newest whole checkpoint: (\S+)", child.before)[1]
        assert load_checkpoint(newest)["exit_reason"] == "periodic"


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_before_the_loop_any_request_ends_the_process_at_once(own, tmp_path, name):
    child = own(BEFORE="rest()")
    child.expect("@resting")
    os.kill(child.pid, signal.Signals[name])
    assert ended(child) == 128 + signal.Signals[name]
    words = "🛑 Exit requested. Training has not begun: there is nothing to save."
    assert shown(child.before) == [words]
    assert not (tmp_path / "ck").exists()


def test_in_the_loop_before_its_first_step_all_is_saved_and_goes_on(own, tmp_path):
    child = own(SAMPLE="rest()")
    child.expect("@resting")
    os.kill(child.pid, signal.SIGTERM)
    assert ended(child) == 143
    path = saved_path(child.before)
    assert path == tmp_path / "ck" / "emergency_exit" / "emergency_step_0.pt"
    assert_says_where_it_is(child.before, load_checkpoint(path))
    child = own("--resume", path, "--steps", 3)
    assert ended(child) == 0 and "All steps done" in child.before


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["q", "SIGTERM"])
def test_a_loader_that_hangs_keeps_nobody_from_leaving(own, workers, how):
    child = own("--workers", workers, SAMPLE="len(LOADED) > 40 and rest()")
    for _ in range(max(1, workers)):
        child.expect("@resting")
    child.send("q\n") if how == "q" else os.kill(child.pid, signal.SIGTERM)
    child.expect("Exit requested!")
    assert ended(child) == (0 if how == "q" else 143)
    assert load_checkpoint(saved_path(child.before))["step"] >= 1
    assert processes_in_session(child.pid) == []


def test_a_request_does_not_wait_for_an_accumulation_whose_next_batch_never_comes(own):
    child = own(
        SAMPLE="len(LOADED) > 40 and rest()",
        BODY="if run.step == 9: os.kill(os.getpid(), 15)\n        if run.step % 8 != 7: continue",
    )
    assert ended(child) == 143
    state = load_checkpoint(saved_path(child.before))
    gradients = state["loop"]["gradients"]
    assert state["step"] == 10 and gradients.keys() == {"model.weight", "model.bias"}


def test_what_the_script_has_written_to_files_that_are_open_is_there(spawn, tmp_path):
    """A process of its own: a fork of the tests does not end as Python does."""
    log, script = tmp_path / "log.txt", tmp_path / "mine.py"
    code = OWN.replace("BEFORE", f"run.file = open({str(log)!r}, 'w')")
    code = code.replace("BODY", "run.file.write('x')").replace("VALUE", "0.0")
    for place in PLACES:
        code = code.replace(place, "")
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})" + code)
    words = [sys.executable, str(script), "--checkpoint-dir", str(tmp_path / "ck")]
    child = spawn(command=words)
    child.expect("step [1-9]")
    child.send("q\n")
    text = finish(child)
    assert child.exitstatus == 0
    assert log.stat().st_size == load_checkpoint(saved_path(text))["step"]


def test_an_exception_in_the_body_saves_what_was_before_the_batch_and_exits_with_1(own):
    child = own(BODY="if run.step == 3: raise ValueError('of mine')")
    assert ended(child) == 1 and "ValueError: of mine" in child.before
    checkpoint = load_checkpoint(saved_path(child.before))
    assert checkpoint["exit_reason"] == "exception_ValueError" and checkpoint["step"] == 3
