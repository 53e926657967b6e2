"""Requests to leave: what each saves and says, the exit code, and that nothing is left behind."""

import os
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    ENDLESS,
    MODES,
    ROOT,
    SCRIPT,
    finish,
    processes_in_session,
    saved_path,
    wait_until,
)

from train_graceful import EXIT_SIGNALS, load_checkpoint

SIGNALS = [signum.name for signum in EXIT_SIGNALS]

# A script of somebody's own. What a test does in it goes to the places in capitals.
OWN = f"""
import os, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
import torch, train_graceful as tg

LOADED = []

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4_000_000
    def __getitem__(self, index):
        LOADED.append(index)
        SAMPLE
        return torch.ones(1)

def rest(where="resting"):
    print("@" + where, flush=True)
    threading.Event().wait()

def train(run):
    BEFORE
    run.data(Data(), torch.ones(4, 1))
    model = run.model(torch.nn.Linear(1, 1))
    optimizer = run.keep(optimizer=torch.optim.SGD(model.parameters(), 0.01))
    def evaluate(batch):
        return {{"accuracy": torch.full((len(batch),), 0.75 - 0.01 * run.step)}}
    for batch in run.batches(evaluate, best="max accuracy"):
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        BODY
        optimizer.step()
        run.log(loss=loss)
    AFTER

if __name__ == "__main__":
    tg.main(train, steps=10**6, batch_size=4, save_every=10**6, eval_every=10**6)
"""
PLACES = ("SAMPLE", "BEFORE", "BODY", "AFTER")


@pytest.fixture
def own(spawn, tmp_path):
    """own(*argv, BODY="...") starts OWN with the places filled in, as a fork; it saves in ck."""
    numbers = iter(range(100))

    def start(*argv: object, real: bool = False, **places: str):
        code = OWN
        for place in PLACES:
            code = code.replace(place, places.get(place, ""))
        script = tmp_path / f"mine_{next(numbers)}.py"
        script.write_text(code)
        words = ["--checkpoint-dir", str(tmp_path / "ck"), *map(str, argv)]
        if real:
            return spawn(command=[sys.executable, str(script), *words])
        return spawn(*words, script=script)

    return start


def ask(child, means: str) -> int:
    """By q, by Ctrl-C typed or by a signal; the exit code that is due."""
    if means == "q":
        child.sendline("q")
        return 0
    if means == "Ctrl-C":
        child.sendintr()
        return 130
    child.kill(signal.Signals[means])
    return 128 + signal.Signals[means]


def left(child, code: int) -> tuple[str, Path, dict]:
    """What it has printed since the last match, when it has left; what it has saved, and where."""
    output = finish(child)
    assert child.exitstatus == code, output
    assert processes_in_session(child.pid) == []
    path = saved_path(output)
    return output, path, load_checkpoint(path)


def shown(output: str) -> list[str]:
    """The lines that stand on the screen, without those that were redrawn."""
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in output.split("\n")]
    return [line for line in lines if line]


def assert_says_where_it_is(output: str, checkpoint: dict, best="Best Accuracy: none yet") -> None:
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


# ---- in training


@pytest.mark.parametrize("means", ["q", "Ctrl-C", *SIGNALS])
def test_a_request_saves_says_where_and_sets_the_exit_code(own, tmp_path, means):
    child = own()
    child.expect("🔄 Training started. Press 'q' \\+ Enter to exit gracefully...")
    before = termios.tcgetattr(child.child_fd)
    child.expect("step [0-9]+/1000000")
    code = ask(child, means)
    child.expect("🛑 Exit requested! Finishing current batch gracefully...")
    output, path, state = left(child, code)
    assert termios.tcgetattr(child.child_fd) == before
    assert path == tmp_path / "ck" / "emergency_exit" / f"emergency_step_{state['step']}.pt"
    reasons = {"q": "user_requested_graceful_exit", "Ctrl-C": "signal_SIGINT"}
    assert state["exit_reason"] == reasons.get(means, f"signal_{means}") and state["step"] > 0
    assert_says_where_it_is(output, state)


@pytest.mark.parametrize("mode", MODES)
def test_the_built_in_program_says_what_it_trains_and_saves_each_of_its_optimizers(
    spawn, options, mode
):
    child = spawn(*options, *ENDLESS, *MODES[mode])
    child.expect(
        "🧠 ByteLM, [0-9,]+ parameters, on (cpu|cuda|mps): [0-9,]+ samples, [0-9,]+ batches of "
        "[0-9]+ an epoch; saves in .*/ck"
    )
    child.expect("step [0-9]+/")
    child.sendline("q")
    output, _, state = left(child, 0)
    assert_says_where_it_is(output, state, "Best Loss: none yet")
    assert state["config"]["mode"] == ("geometric" if mode == "geometric" else "standard")
    names = ["rotation", "expert", "embedding"] if mode == "geometric" else ["adamw"]
    assert list(state["optimizer_state_dicts"]) == list(state["scheduler_state_dicts"]) == names


def test_the_summary_and_the_status_line_name_the_best_value(own):
    child = own("--eval-every", 1, BODY="time.sleep(0.1)")
    child.expect(r"val accuracy 0\.7300 \(best 0\.7400\)")
    child.sendline("q")
    output, _, state = left(child, 0)
    assert_says_where_it_is(output, state, "Best Accuracy: 0.7400")


@pytest.mark.parametrize("means", ["Ctrl-C", "group", "closed"])
def test_what_reaches_the_workers_too_is_one_request_and_leaves_no_process(
    fork, options, tmp_path, means
):
    """Ctrl-C, a SIGTERM to the whole group, a terminal that is closed."""
    child = fork(*options, *ENDLESS, "--workers", 2)
    child.terminal.expect("step [0-9]+/")
    assert len(processes_in_session(child.pid)) >= 3
    output = ""
    if means == "closed":
        child.terminal.close()
        child.wait()
    elif means == "group":
        os.killpg(child.pid, signal.SIGTERM)
        output = child.finish()
    else:
        child.terminal.send("\x03")
        output = child.finish()
    assert output.count("Exit requested!") <= 1 and "Traceback" not in output
    signum = {"Ctrl-C": signal.SIGINT, "group": signal.SIGTERM, "closed": signal.SIGHUP}[means]
    assert child.exitcode == 128 + signum
    [path] = (tmp_path / "ck" / "emergency_exit").iterdir()
    assert load_checkpoint(path)["exit_reason"] == f"signal_{signum.name}"
    assert processes_in_session(child.pid) == []


@pytest.mark.parametrize("first, later", [("q", ["SIGTERM", "SIGUSR1"]), ("SIGINT", ["SIGINT"])])
def test_of_several_requests_the_first_one_counts(own, tmp_path, first, later):
    """Two SIGINT within half a second are one: coreutils' timeout delivers each twice."""
    go = tmp_path / "go"
    child = own(BODY=f"while run.step == 3 and not os.path.exists({str(go)!r}): pass")
    child.expect("Training started")
    code = ask(child, first)
    child.expect("Exit requested!")
    for name in later:
        ask(child, name)
    go.touch()
    output, _, state = left(child, code)
    assert "requested!" not in output and "Second" not in output
    assert output.count("Saving emergency") == 1
    reason = "signal_SIGINT" if first == "SIGINT" else "user_requested_graceful_exit"
    assert state["exit_reason"] == reason


STUCK = """def stuck(state, path):
        path.parent.mkdir()
        path.with_name("." + path.name + ".tmp").write_bytes(b"half")
        print("@saving", flush=True)
        while len(run.monitor.heard) < 2:
            pass
        rest()
    tg.save_checkpoint = stuck"""


def test_ctrl_c_after_q_waits_for_the_save_and_a_second_one_abandons_it(own, tmp_path):
    finish(own("--steps", 2))
    child = own("--workers", 2, BEFORE=STUCK)
    child.expect("Training started")
    before = termios.tcgetattr(child.child_fd)
    child.expect("step [0-9]+/")
    child.sendline("q")
    child.expect("@saving")
    child.sendintr()
    child.expect("@resting")
    heard = time.monotonic()
    # Within half a second it would be the same one.
    wait_until(lambda: time.monotonic() - heard > 0.6)
    child.sendintr()
    child.expect("Second Ctrl-C: leaving without saving. Earlier checkpoints are whole.")
    finish(child)
    assert child.exitstatus == 130 and termios.tcgetattr(child.child_fd) == before
    assert processes_in_session(child.pid) == []
    assert not list((tmp_path / "ck" / "emergency_exit").glob("[!.]*"))
    child = own("--resume", "latest", "--steps", 3)
    assert "All steps done" in finish(child) and child.exitstatus == 0
    assert not list((tmp_path / "ck").rglob(".*.tmp"))


@pytest.mark.parametrize("another_place", [True, False])
def test_after_a_signal_a_failed_save_goes_to_the_temporary_directory(
    own, monkeypatch, tmp_path, another_place
):
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck" / "emergency_exit").write_text("a file where the directory should be")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("TMPDIR", str(elsewhere))
    child = own("--save-every", 5, BEFORE="import tempfile; tempfile.gettempdir()")
    child.expect("step [1-9][0-9]+/")
    if not another_place:
        elsewhere.rename(tmp_path / "gone")
        elsewhere.write_text("in the way")
    child.kill(signal.SIGTERM)
    if another_place:
        output, path, state = left(child, 143)
        assert state["exit_reason"] == "signal_SIGTERM"
        name = f"train_graceful_{state['run_id']}_emergency_step_{state['step']}.pt"
        assert path == elsewhere / name
        assert shown(output)[-2] == f"   Emergency checkpoint: {path}"
    else:
        output = finish(child)
        assert child.exitstatus == 1 and "Graceful exit completed" not in output
        newest = re.search(r"Newest whole checkpoint: (\S+)", output)[1]
        assert load_checkpoint(newest)["exit_reason"] == "periodic"
    assert "Emergency checkpoint not saved: " in output


def test_what_the_script_has_written_to_files_that_are_open_is_there(own, tmp_path):
    """A process of its own: a fork of the tests does not end as Python does."""
    log = tmp_path / "log.txt"
    open_file = f"run.file = open({str(log)!r}, 'w')"
    child = own(BEFORE=open_file, BODY="run.file.write('x')", real=True)
    child.expect("step [1-9]")
    child.sendline("q")
    _, _, state = left(child, 0)
    assert log.stat().st_size == state["step"]


# ---- where no batch ends


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_torch_is_imported_ends_it_without_a_traceback(
    spawn, options, tmp_path, name
):
    """There is nothing to save yet."""
    # importtime names each module as it is imported.
    child = spawn(command=[sys.executable, "-X", "importtime", str(SCRIPT), *options, *ENDLESS])
    child.expect("torch[.]_")
    child.kill(signal.Signals[name])
    assert "Traceback" not in finish(child) and child.signalstatus == signal.Signals[name]
    assert not (tmp_path / "ck").exists()


BEFORE = [("BEFORE", means) for means in ("q", *SIGNALS)]


@pytest.mark.parametrize(
    "where, means", [*BEFORE, ("AFTER", "q"), ("AFTER", "SIGINT"), ("AFTER", "SIGTERM")]
)
def test_outside_of_the_loop_a_request_ends_the_process_at_once(own, tmp_path, where, means):
    """Nothing can be lost there: all is saved, or nothing was trained."""
    child = own("--steps", 3, **{where: "rest()"})
    child.expect("@resting\r\n")
    before = termios.tcgetattr(child.child_fd)
    code = ask(child, means)
    output = finish(child)
    assert child.exitstatus == code and termios.tcgetattr(child.child_fd) == before
    words = "Training has not begun: there is nothing to save."
    words = "Everything is saved already." if where == "AFTER" else words
    assert shown(output)[-1] == f"🛑 Exit requested. {words}"
    assert (tmp_path / "ck" / "final.pt").exists() == (where == "AFTER")
    assert (tmp_path / "ck").exists() == (where == "AFTER")


def test_in_the_loop_before_its_first_step_all_is_saved_and_goes_on(own, tmp_path):
    child = own(SAMPLE="rest()")
    child.expect("@resting")
    child.kill(signal.SIGTERM)
    output, path, state = left(child, 143)
    assert path == tmp_path / "ck" / "emergency_exit" / "emergency_step_0.pt"
    assert_says_where_it_is(output, state)
    child = own("--resume", path, "--steps", 3)
    assert "All steps done" in finish(child) and child.exitstatus == 0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("means", ["q", "SIGTERM"])
def test_a_loader_that_hangs_keeps_nobody_from_leaving(own, workers, means):
    child = own("--workers", workers, SAMPLE="len(LOADED) > 40 and rest()")
    for _ in range(max(1, workers)):
        child.expect("@resting")
    code = ask(child, means)
    child.expect("Exit requested!")
    assert left(child, code)[2]["step"] >= 1


def test_a_request_does_not_wait_for_an_accumulation_whose_next_batch_never_comes(own):
    body = "if run.step == 9: os.kill(os.getpid(), 15)\n        if run.step % 8 != 7: continue"
    _, _, state = left(own(SAMPLE="len(LOADED) > 40 and rest()", BODY=body), 143)
    gradients = state["loop"]["gradients"]
    assert state["step"] == 10 and gradients.keys() == {"model.weight", "model.bias"}


# ---- the monitor alone

BUSY = """
import torch, train_graceful as t
a = torch.rand(4000, 4000)
with t.ExitMonitor() as monitor:
    t.Screen().say("@busy")
    torch.mm(a, a)
    t.Screen().say("@done")
"""


@pytest.mark.parametrize("means", ["q", "SIGTERM"])
def test_a_request_is_heard_inside_a_long_torch_operation(spawn, means):
    child = spawn(source=BUSY)
    child.expect("@busy")
    ask(child, means)
    child.expect("Exit requested!")
    assert "@done" not in child.before
    child.expect("@done")
    finish(child)


IDLE = """
import os, pathlib, signal, threading, train_graceful as t

def state():
    return [signal.getsignal(s) for s in range(1, 32)], sorted(os.listdir("/proc/self/fd"))

def switches():
    status = pathlib.Path(f"/proc/self/task/{thread.native_id}/status").read_text()
    return sum(int(line.split()[1]) for line in status.splitlines() if "ctxt_switches" in line)

before, wait = state(), threading.Event().wait
for _ in range(3):
    with t.ExitMonitor() as monitor:
        [thread] = [one for one in threading.enumerate() if one.name == "exit-monitor"]
        while switches() != (wait(0.2), switches())[1]:
            pass
        idle = switches()
        wait(1.0)
        print("wake-ups", switches() - idle)
assert state() == before and signal.set_wakeup_fd(-1) == -1
print("@given back")
"""


def test_an_idle_monitor_never_wakes_up_and_gives_handlers_and_descriptors_back(spawn):
    child = spawn(source=IDLE)
    child.expect("@given back")
    assert child.before.count("wake-ups 0\r\n") == 3, child.before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_cache_is_cleared_and_memory_returned(spawn, options):
    child = spawn(*options, *ENDLESS, "--device", "cuda")
    child.expect("step [0-9]+/")
    child.sendline("q")
    assert "🧹 CUDA cache cleared" in left(child, 0)[0]
    query = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    used = subprocess.run(query, capture_output=True, text=True).stdout
    assert str(child.pid) not in used.split()
