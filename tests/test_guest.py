"""The program is a good guest: debuggers, print(), sweeps, notebooks work as without it."""

import gc
import io
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import helpers as h
import numpy as np
import pytest
import torch
from torch import nn

import train_graceful as tg

SOURCE = """
import logging, sys, time
from helpers import learning, program, update

def output():
    return sys.stdout, sys.stdout.fileno(), sys.stdout.isatty(), sys.stdout.encoding

first = output()
logger = logging.Logger("mine")
logger.addHandler(logging.StreamHandler())

def body(run, module, optimizer, batch):
    BODY
    return update(run, module, optimizer, batch)

program(learning(body=body), steps=10**6, eval_every=10**6, save_every=10**6)()
"""
WITH_PATH = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture
def mine(spawn, tmp_path):
    """mine(body) runs a script with that in its loop on a terminal, with settings of spawn."""

    def start(body: str, **settings):
        script = tmp_path / "mine.py"
        script.write_text(SOURCE.replace("BODY", body.strip().replace("\n", "\n    ")))
        return spawn(script=script, cwd=tmp_path, **settings)

    return start


# ---- debuggers


def left_on_q(child) -> str:
    child.expect(r"step \d\d+/")
    child.sendline("q")
    child.expect("Graceful exit completed!")
    return h.finish(child)


def test_what_is_typed_in_a_debugger_is_the_debuggers(mine):
    # A process of its own: pytest has a debugger in the place of pdb.
    child = mine("if run.step in (3, 5, 6):\n    breakpoint()", env=WITH_PATH)
    for _ in range(3):
        child.expect_exact("(Pdb) ")
        for question, answer in (("p 6*7", "42"), ("p run.step", r"\d")):
            child.sendline(question)
            child.expect(rf"\r\n{answer}\r\n")
            child.expect_exact("(Pdb) ")
        child.sendline("c")
    assert "Keys:" not in left_on_q(child) and child.exitstatus == 0


def test_input_in_the_loop_gets_its_line_and_no_status_line_before_it(mine):
    child = mine("if run.step == 3:\n    print('got', input('How? ').upper())")
    child.expect("How[?] ")
    assert "step" not in seen(child.before).splitlines()[-1]
    child.sendline("quit")
    child.expect("got QUIT\r\n")
    left_on_q(child)


# ---- print() and the status line


def seen(output: str) -> str:
    """What a terminal shows of output: a carriage return goes back, and what follows overwrites."""
    lines = []
    for line in output.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return "\n".join(lines)


PRINTS = """
if run.step % 10 == 0:
    print("printed", run.step)
    print("still the same", first == output() and first[2], flush=True)
    logger.warning("a warning")
if run.step % 50 == 12:
    for number in range(4):
        sys.stderr.write(f"\\rbar {number} of 3")
        time.sleep(0.03)
        sys.stderr.flush()
    sys.stderr.write("\\n")
if run.step % 50 == 22:
    print("half a line", end="", flush=True)
if run.step % 50 == 26:
    print(", its other half")
time.sleep(0.02)
"""


def test_nothing_that_the_loop_prints_sticks_to_the_status_line(mine):
    """And standard output is what it was."""
    child = mine(PRINTS)
    child.expect(".*its other half" * 3)
    os.kill(child.pid, signal.SIGTERM)
    text = child.after + h.finish(child)
    lines = seen(text).splitlines()
    assert "step " in text and not [line for line in lines if "step " in line]
    whole = {"still the same True", "a warning", "bar 3 of 3", "half a line, its other half"}
    assert whole <= set(lines)
    piece = re.compile("printed|same|a warning|bar 3|half")
    pieces = {line for line in lines if piece.search(line)} - whole
    assert not [line for line in pieces if not re.fullmatch(r"printed \d+", line)]


# ---- sweeps and notebooks


def raised(kind: type, train, directory, *args, words=None, **options) -> None:
    """What main(train, argv=[...]) raises in the caller's process."""
    argv = ["--no-keyboard", "--checkpoint-dir", str(directory), *map(str, args)]
    with pytest.raises(kind, match=words):
        tg.main(train, argv=argv, **{**h.OWN, **options})


class Pruned(Exception):
    """As a search for good options raises it for a run that is not worth its time."""


def prunes(run, module, optimizer, batch):
    if run.step == run.options.fails:
        raise Pruned("bad")
    return h.update(run, module, optimizer, batch)


PRUNED = h.learning(body=prunes)


def test_main_with_argv_returns_the_run(tmp_path):
    """One that is finished, too, says where it is when it is resumed."""
    run = h.go(h.learning(), tmp_path / "a")
    assert run.completed and run.exit_code == 0 and run.step == 12
    assert run.saved == tmp_path / "a" / "final.pt" and run.best > 0
    again = h.resume(h.learning(), tmp_path / "a")
    assert again.completed and again.saved == run.saved and again.best == run.best
    left = h.go(h.learning(), tmp_path / "b", stop=4)
    assert not left.completed and left.exit_code == 143 and left.step == 4
    assert left.saved == tmp_path / "b" / "emergency_exit" / "emergency_step_4.pt"


def test_an_exception_of_the_body_comes_through_once_its_state_is_safe(tmp_path, capfd):
    raised(Pruned, PRUNED, tmp_path, "--fails", 5, words="bad")
    saved = tg.load_checkpoint(tmp_path / "emergency_exit" / "emergency_step_5.pt")
    assert saved["exit_reason"] == "exception_Pruned"
    said = capfd.readouterr()
    assert "Resume with" in said.out and not said.err


def test_a_request_in_the_batch_that_raises_ends_the_sweep_too(tmp_path):
    raised(SystemExit, h.stopping(PRUNED, 4), tmp_path, "--fails", 3, words="143")


def test_an_exception_before_anything_is_trained_saves_nothing(tmp_path, capfd):
    """Not of a fresh run and not of a resumed one, whose checkpoint is named instead."""
    raised(Pruned, PRUNED, tmp_path, "--fails", 0)
    assert not list(tmp_path.rglob("*.pt"))
    left = h.go(PRUNED, tmp_path, stop=3)
    raised(Pruned, PRUNED, tmp_path, "--fails", 3, "--resume", "latest")
    assert list(tmp_path.rglob("*.pt")) == [left.saved]
    assert f"Newest whole checkpoint: {left.saved}\n" in capfd.readouterr().out


def test_a_mistake_is_raised(tmp_path):
    raised(tg.UserError, h.learning(), tmp_path, "--steps", "x", words="--steps")
    raised(tg.UserError, h.learning(), tmp_path, words="batch_size is meant", batchsize=4)
    raised(SystemExit, h.learning(lambda run, module: sys.exit(7)), tmp_path, words="7")
    raised(SystemExit, h.learning(), tmp_path, "--help", words="0")
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(raised, tg.UserError, h.learning(), tmp_path, words="main thread")
        call.result()


def test_a_random_search_goes_on_between_its_runs(tmp_path):
    """The seed of a run is for what is in it."""
    drawn = set()
    for number in range(4):
        drawn |= {random.random(), np.random.rand(), torch.rand(1).item()}
        h.go(h.learning(), tmp_path / str(number))
    assert len(drawn) == 12


def test_what_is_typed_at_an_interpreter_is_its_own(tmp_path):
    """Without argv too, for sys.argv is not the cell's; nothing of it is lost, and nothing ends."""
    lines = ["import train_graceful as tg", "from helpers import learning", "number = 40"]
    words = "checkpoint_dir=tg.option('ck', fixed=False), batch_size=4, steps=200, lr=0.01"
    lines += [f"run = tg.main(learning(), {words})", "q = 'mine'", "q", "print(run.step, number)"]
    result = subprocess.run(
        [sys.executable, "-i", "-c", "import sys; sys.ps1 = sys.ps2 = ''"],
        input="\n".join(lines) + "\n",
        cwd=tmp_path,
        env=WITH_PATH,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and "'mine'\n200 40\n" in result.stdout, result
    assert "Interrupt it or send SIGTERM to exit" in result.stdout


def everything() -> dict:
    """What a process holds beside memory."""
    gc.collect()
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "descriptors": sorted(os.listdir("/proc/self/fd")),
        "handlers": {signum: signal.getsignal(signum) for signum in signal.valid_signals()},
        "wake-up": signal.set_wakeup_fd(signal.set_wakeup_fd(-1)),
        "children": multiprocessing.active_children(),
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
    }


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_hundred_runs_in_a_process_leave_nothing_behind(tmp_path, capfd):
    """Completed ones, left ones, failed ones and mistakes, in a few directories."""
    ways = {"completed": {}, "left": {"stop": 3}, "failed": {"code": 1, "fails": 2}}
    ways["mistaken"] = {"code": 2, "resume": "latest"}

    def four(number: int) -> None:
        workers = 2 * (number % 5 == 0)
        for way, how in ways.items():
            h.go(PRUNED, tmp_path / f"{way} {number % 2}", "--workers", workers, **how)

    four(0)
    before = everything()
    for number in range(1, 25):
        four(number)
    assert everything() == before


def interrupt(run: tg.Run, wait: float = 60) -> None:
    """As a notebook's Stop does."""
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait(wait)


def stopped_twice(run, module, optimizer, batch):
    # Sooner it would be the same one.
    interrupt(run, 0.7)
    interrupt(run)


def stopped_behind_the_loop(run: tg.Run) -> None:
    h.learning()(run)
    interrupt(run)


STOPPED = {
    "Second Ctrl-C: leaving without saving": h.learning(body=stopped_twice),
    "there is nothing to save": interrupt,
    "Everything is saved already": stopped_behind_the_loop,
}


@pytest.mark.parametrize("words", STOPPED)
def test_a_notebooks_stop_ends_the_call_and_not_the_process(tmp_path, capfd, words):
    raised(KeyboardInterrupt, STOPPED[words], tmp_path)
    assert words in capfd.readouterr().out
    assert not (tmp_path / "emergency_exit").exists()
    assert h.go(h.learning(), tmp_path).completed


class Notebook(io.TextIOBase):
    """A notebook's sys.stdout: text goes to the page, and fileno() is the server's terminal."""

    def __init__(self) -> None:
        self.text = ""

    def fileno(self) -> int:
        return 1

    def write(self, text: str) -> int:
        self.text += text
        return len(text)


def test_in_a_notebook_all_lines_are_in_the_notebook(tmp_path, capfd, monkeypatch):
    page = Notebook()
    monkeypatch.setattr(sys, "stdout", page)
    monkeypatch.setattr(sys, "stdin", Notebook())
    h.go(h.learning(), tmp_path)
    assert page.text.startswith("🧠 Linear") and page.text.endswith("final.pt\n")
    assert "step 12/12 | loss" in page.text and "\r" not in page.text
    assert capfd.readouterr() == ("", "")


# ---- rows and checkpoints


def test_each_row_is_given_to_on_row_and_one_that_it_could_not_take_again(tmp_path):
    rows = []

    def begin(run: tg.Run, module: nn.Module) -> torch.optim.Optimizer:
        def takes(row: dict) -> None:
            rows.append(row)
            if row["step"] == 3 and not run.resumed:
                raise OSError("no network")

        run.on_row = takes
        groups = [{"params": [module.weight], "lr": 0.1}, {"params": [module.bias], "lr": 0.02}]
        return run.keep(optimizer=torch.optim.SGD(groups))

    raised(OSError, h.learning(begin), tmp_path, words="no network")
    h.resume(h.learning(begin), tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, *range(3, 13)]
    assert rows.pop(2)["loss"] == rows[2]["loss"]
    written = h.metrics_without_times(tmp_path)
    assert [{k: str(row.get(k, "")) for k in written[0]} for row in rows] == written
    assert (rows[0]["lr_optimizer"], rows[0]["lr_optimizer.1"]) == (0.1, 0.02)


def test_emergency_checkpoints_are_kept_as_periodic_ones_are(tmp_path):
    """But for the one that was named last, which a person may want any day."""
    options, saved = {"save_every": 2, "keep": 2, "steps": 60}, []
    for step in range(5, 45, 5):
        saved.append(h.go(h.learning(), tmp_path, "--resume", "auto", stop=step, **options).saved)
        assert all(path.exists() for path in saved[-2:])
    assert {*(tmp_path / "emergency_exit").iterdir()} == {*saved[-2:]}
    h.resume(h.learning(), tmp_path, "--keep", 1, **options)
    assert [*(tmp_path / "emergency_exit").iterdir()] == saved[-1:]
    assert [path.name for path in tmp_path.glob("step_*.pt")] == ["step_60.pt"]


# ---- no temporary directory

READ_ONLY = """
mount --bind "$1" /mnt
for folder in /tmp /var/tmp; do mount --bind $folder $folder; mount -o remount,ro,bind $folder; done
cd /tmp
shift
exec "$@"
"""


def test_without_any_temporary_directory_it_trains(options, tmp_path):
    """A read-only root with one volume: PyTorch's compiler, which Adam imports, wants one."""
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-ec"]
    if not shutil.which("unshare") or subprocess.run([*namespace, "cd /mnt"]).returncode:
        pytest.skip("needs a namespace of its own")
    words = [
        sys.executable,
        str(h.SCRIPT),
        *options,
        "--checkpoint-dir",
        "/mnt/ck",
        "--workers",
        "1",
    ]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("TMPDIR", None)
    for more in (["--steps", "3"], ["--steps", "5", "--resume", "/mnt/ck/final.pt"]):
        command = [*namespace, READ_ONLY, "sh", str(tmp_path), *words, *more]
        how = {"text": True, "stdin": subprocess.DEVNULL, "env": environment}
        result = subprocess.run(command, capture_output=True, **how)
        assert result.returncode == 0 and not result.stderr, result.stderr
    assert tg.load_checkpoint(tmp_path / "ck" / "final.pt")["step"] == 5
    assert not list((tmp_path / "ck").glob("pymp-*"))


# ---- what a new user is told


def test_another_number_of_threads_is_said(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    h.go(h.learning(), tmp_path, stop=4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    h.resume(h.learning(), tmp_path)
    line = "⚙️ Changed: 9 threads, 1 processes (was 7 threads, 1 processes).\n"
    assert line in capfd.readouterr().out
