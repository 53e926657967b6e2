"""Requests to leave: what each saves and says, the exit code, and that nothing is left behind."""

import errno
import os
import re
import signal
import subprocess
import sys
import termios
from pathlib import Path

import helpers as h
import pytest
import torch

import train_graceful
from train_graceful import EXIT_SIGNALS, load_checkpoint, save_checkpoint

# A script of somebody's own. What a test does in it goes to the places in capitals.
OWN = f"""
import os, sys, threading
sys.path.insert(0, {str(h.ROOT)!r})
import torch, train_graceful as tg

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
REASONS = {"q": "user_requested_graceful_exit"}


@pytest.fixture
def own(spawn, tmp_path):
    """own(*argv, BODY="...") starts OWN with the places filled in; it saves in ck.

    As a fork, or with options of pexpect.spawn as a process of its own.
    """

    def start(*argv: object, how=None, **places: str):
        code = OWN
        for place in ("SAMPLE", "BEFORE", "BODY", "AFTER"):
            code = code.replace(place, places.get(place, ""))
        script = tmp_path / "mine.py"
        script.write_text(code)
        return spawn("--checkpoint-dir", tmp_path / "ck", *argv, script=script, **(how or {}))

    return start


def ask(child, means: str) -> int:
    """By q or by a signal; the exit code that is due."""
    if means == "q":
        child.sendline("q")
        return 0
    child.kill(signal.Signals[means])
    return 128 + signal.Signals[means]


def left(child, code: int) -> tuple[str, Path, dict]:
    """What it has printed since the last match, when it has left; what it has saved, and where."""
    output = h.finish(child)
    assert child.exitstatus == code, output
    assert h.processes_in_session(child.pid) == []
    path = h.saved_path(output)
    return output, path, load_checkpoint(path)


def assert_says_where_it_is(output: str, checkpoint: dict, best="Best Accuracy: none yet") -> None:
    """From the save on, exactly the lines of the contract."""
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in output.split("\n")]
    lines, path = [line for line in lines if line], h.saved_path(output)
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


@pytest.mark.parametrize("means", ["q", *(signum.name for signum in EXIT_SIGNALS)])
def test_a_request_saves_says_where_and_sets_the_exit_code(own, tmp_path, means):
    child = own("--eval-every", 1)
    child.expect("🔄 Training started. Press 'q' \\+ Enter to exit gracefully...")
    before = termios.tcgetattr(child.child_fd)
    child.expect(r"step [0-9]+/1000000 .*val accuracy \S+ \(best 0\.7400\)")
    code = ask(child, means)
    child.expect("🛑 Exit requested! Finishing current batch gracefully...")
    output, path, state = left(child, code)
    assert termios.tcgetattr(child.child_fd) == before
    assert path == tmp_path / "ck" / "emergency_exit" / f"emergency_step_{state['step']}.pt"
    assert state["exit_reason"] == REASONS.get(means, f"signal_{means}") and state["step"] > 0
    assert_says_where_it_is(output, state, "Best Accuracy: 0.7400")


@pytest.mark.parametrize("mode", h.MODES)
def test_the_built_in_program_says_what_it_trains_and_saves_each_of_its_optimizers(
    spawn, options, mode
):
    child = spawn(*options, *h.ENDLESS, *h.MODES[mode])
    child.expect(
        "🧠 ByteLM, [0-9,]+ parameters, on (cpu|cuda|mps): [0-9,]+ samples, [0-9,]+ batches of "
        "[0-9]+ an epoch; saves in .*/ck"
    )
    child.expect("step [0-9]+/")
    output, _, state = left(child, ask(child, "q"))
    assert_says_where_it_is(output, state, "Best Loss: none yet")
    assert state["config"]["mode"] == ("geometric" if mode == "geometric" else "standard")
    names = ["rotation", "expert", "embedding"] if mode == "geometric" else ["adamw"]
    assert list(state["optimizer_state_dicts"]) == list(state["scheduler_state_dicts"]) == names


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_reaches_the_workers_too_is_one_request_and_leaves_no_process(
    fork, options, tmp_path, signum
):
    """A signal to the whole group, a terminal that is closed."""
    child = fork(*options, *h.ENDLESS, "--workers", 2)
    child.terminal.expect("step [0-9]+/")
    assert len(h.processes_in_session(child.pid)) >= 3
    if signum == signal.SIGHUP:
        child.terminal.close()
        child.wait()
    else:
        os.killpg(child.pid, signum)
        output = child.finish()
        assert output.count("Exit requested!") == 1 and "Traceback" not in output
    assert child.exitcode == 128 + signum
    [path] = (tmp_path / "ck" / "emergency_exit").iterdir()
    assert load_checkpoint(path)["exit_reason"] == f"signal_{signum.name}"
    assert h.processes_in_session(child.pid) == []


# Of two more signals the last one tells that the other has been heard.
ASKED_AGAIN = """if run.step == 3:
            print("@held", flush=True)
            while not run.monitor.exit_requested:
                pass
            os.kill(os.getpid(), {0:d})
            os.kill(os.getpid(), {1:d})
            while run.monitor.heard[-1][1] != 128 + {1:d}:
                pass"""


@pytest.mark.parametrize("first, later", [("q", signal.SIGTERM), ("SIGINT", signal.SIGINT)])
def test_of_several_requests_the_first_one_counts(own, first, later):
    """Two SIGINT within half a second are one: coreutils' timeout delivers each twice."""
    child = own(BODY=ASKED_AGAIN.format(later, signal.SIGUSR1))
    child.expect("@held")
    code = ask(child, first)
    output, _, state = left(child, code)
    assert output.count("requested!") == 1 and "Second" not in output and state["step"] == 4
    assert output.count("Saving emergency") == 1
    assert state["exit_reason"] == REASONS.get(first, f"signal_{first}")


STUCK = """def stuck(state, path):
        print("@saving", flush=True)
        while len(run.monitor.heard) < 2:
            pass
        # Within half a second the next one would be the same.
        threading.Event().wait(0.6)
        rest()
    tg.save_checkpoint = stuck"""


def test_a_signal_behind_a_q_whose_save_fails_still_ends_the_run(tmp_path, monkeypatch):
    """The q is taken back, and nothing else."""
    asked = []

    def body(run, module, optimizer, batch):
        if run.step == 5:
            run.monitor.request(REASONS["q"], 0)
            asked.append(run.monitor)
        return h.update(run, module, optimizer, batch)

    def fails_once(state: dict, path: Path) -> None:
        if asked and path.name == "emergency_step_6.pt":
            monitor = asked.pop()
            os.kill(os.getpid(), signal.SIGTERM)
            h.wait_until(lambda: len(monitor.heard) == 2)
            raise OSError(errno.ENOSPC, "full")
        save_checkpoint(state, path)

    monkeypatch.setattr(train_graceful, "save_checkpoint", fails_once)
    run = h.go(h.learning(body=body), tmp_path, code=143)
    assert load_checkpoint(run.saved)["exit_reason"] == "signal_SIGTERM"


def test_ctrl_c_after_q_waits_for_the_save_and_a_second_one_abandons_it(own, tmp_path):
    child = own("--workers", 2, BEFORE=STUCK)
    child.expect("step [0-9]+/")
    child.sendline("q")
    child.expect("@saving")
    child.sendintr()
    child.expect("@resting")
    child.sendintr()
    child.expect("Second Ctrl-C: leaving without saving. Earlier checkpoints are whole.")
    h.finish(child)
    assert child.exitstatus == 130 and h.processes_in_session(child.pid) == []
    assert not (tmp_path / "ck" / "emergency_exit").exists()


def test_what_the_script_has_written_to_files_that_are_open_is_there(own, tmp_path):
    """A process of its own: a fork of the tests does not end as Python does."""
    log = tmp_path / "log.txt"
    open_file = f"run.file = open({str(log)!r}, 'w')"
    child = own(BEFORE=open_file, BODY="run.file.write('x')", how={"env": os.environ})
    child.expect("step [1-9]")
    _, _, state = left(child, ask(child, "q"))
    assert log.stat().st_size == state["step"]


# ---- where no batch ends


def test_ctrl_c_while_torch_is_imported_ends_it_without_a_traceback(spawn, options, tmp_path):
    # importtime names each module as it is imported.
    child = spawn(command=[sys.executable, "-X", "importtime", str(h.SCRIPT), *options, *h.ENDLESS])
    child.expect("torch[.]_")
    child.sendintr()
    assert "Traceback" not in h.finish(child) and child.signalstatus == signal.SIGINT
    assert not (tmp_path / "ck").exists()


@pytest.mark.parametrize("means", ["q", "SIGINT", "SIGTERM"])
@pytest.mark.parametrize("where", ["BEFORE", "AFTER"])
def test_outside_of_the_loop_a_request_ends_the_process_at_once(own, tmp_path, where, means):
    """Nothing can be lost there: all is saved, or nothing was trained."""
    child = own("--steps", 3, **{where: "rest()"})
    child.expect("@resting\r\n")
    before = termios.tcgetattr(child.child_fd)
    code = ask(child, means)
    output = h.finish(child)
    assert child.exitstatus == code and termios.tcgetattr(child.child_fd) == before
    words = "Training has not begun: there is nothing to save."
    words = "Everything is saved already." if where == "AFTER" else words
    assert output.endswith(f"🛑 Exit requested. {words}\r\n")
    assert (tmp_path / "ck" / "final.pt").exists() == (where == "AFTER")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("means, samples", [("q", 40), ("SIGTERM", 0)])
def test_a_loader_that_hangs_keeps_nobody_from_leaving(own, workers, means, samples):
    child = own("--workers", workers, SAMPLE=f"len(LOADED) > {samples} and rest()")
    for _ in range(max(1, workers)):
        child.expect("@resting")
    code = ask(child, means)
    child.expect("Exit requested!")
    output, _, state = left(child, code)
    assert_says_where_it_is(output, state)
    assert (state["step"] > 0) == (samples > 0)


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
    h.finish(child)


IDLE = """
import pathlib, threading, train_graceful as t

def switches():
    status = pathlib.Path(f"/proc/self/task/{thread.native_id}/status").read_text()
    return sum(int(line.split()[1]) for line in status.splitlines() if "ctxt_switches" in line)

wait = threading.Event().wait
with t.ExitMonitor():
    [thread] = [one for one in threading.enumerate() if one.name == "exit-monitor"]
    while switches() != (wait(0.2), switches())[1]:
        pass
    idle = switches()
    wait(1.0)
    print("wake-ups", switches() - idle)
"""


def test_an_idle_monitor_never_wakes_up(spawn):
    assert "wake-ups 0\r\n" in h.finish(spawn(source=IDLE))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_cache_is_cleared_and_memory_returned(spawn, options):
    child = spawn(*options, *h.ENDLESS, "--device", "cuda")
    child.expect("step [0-9]+/")
    assert "🧹 CUDA cache cleared" in left(child, ask(child, "q"))[0]
    query = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    used = subprocess.run(query, capture_output=True, text=True).stdout
    assert str(child.pid) not in used.split()
