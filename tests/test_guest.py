"""The program is a good guest: debuggers, print(), sweeps and notebooks work as they do without it."""

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
import textwrap
import threading

import numpy as np
import pytest
import torch
from helpers import SCRIPT, ask_to_leave, finish, finished, metrics_without_times
from torch import nn

import train_graceful as tg

SOURCE = """
import logging, os, sys, time, warnings
import torch, train_graceful as tg

def output():
    return sys.stdout, sys.stdout.fileno(), sys.stdout.isatty(), sys.stdout.encoding

first = output()
logger = logging.Logger("mine")
logger.addHandler(logging.StreamHandler())

def train(run):
    run.data(torch.randn(64, 4), torch.randn(8, 4))
    model = run.model(torch.nn.Linear(4, 1))
    optimizer = run.keep(optimizer=torch.optim.SGD(model.parameters(), 0.01))
    for batch in run.batches(lambda batch: {"loss": model(batch).square().flatten()}):
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss)
        BODY

tg.main(train, steps=10**6, batch_size=4, save_every=10**6)
"""


@pytest.fixture
def mine(spawn, tmp_path):
    """mine(body, command=[...]) runs a script with that in its loop on a terminal."""

    def start(body: str, command=None):
        body = textwrap.indent(textwrap.dedent(body), " " * 8).strip()
        source = SOURCE.replace("BODY", body)
        (tmp_path / "mine.py").write_text(source)
        if command is None:
            return spawn(script=tmp_path / "mine.py", cwd=tmp_path)
        path = os.pathsep.join(sys.path)
        return spawn(command=command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})

    return start


# ---- debuggers


@pytest.mark.parametrize("what", ["breakpoint()", "import pdb; pdb.set_trace()"])
def test_what_is_typed_in_a_debugger_is_the_debuggers(mine, what):
    # A process of its own: pytest has a debugger in the place of pdb.
    command = [sys.executable, "mine.py"]
    child = mine(f"if run.step in (3, 5, 6):\n    {what}", command=command)
    for _ in range(3):
        child.expect_exact("(Pdb) ")
        for question, answer in (("p 6*7", "42"), ("p 3*5", "15"), ("p run.step", r"\d")):
            child.sendline(question)
            child.expect(rf"\r\n{answer}\r\n")
            child.expect_exact("(Pdb) ")
        child.sendline("c")
    child.expect(r"step \d\d+/")
    child.sendline("q")
    child.expect("Graceful exit completed!")
    assert "Keys:" not in finish(child) and child.exitstatus == 0


def test_under_python_m_pdb_the_program_hears_what_the_debugger_does_not(mine):
    child = mine("", command=[sys.executable, "-m", "pdb", "mine.py"])
    child.expect_exact("(Pdb) ")
    for command in ("b 21", "c"):
        child.sendline(command)
        child.expect_exact("(Pdb) ")
    child.sendline("p run.step + 40")
    child.expect(r"\r\n4\d\r\n")
    child.sendline("clear 1")
    child.expect_exact("(Pdb) ")
    child.sendline("c")
    child.expect(r"step \d\d+/")
    child.sendline("q")
    child.expect("Graceful exit completed!")
    child.sendline("q")
    finish(child)


def test_input_in_the_loop_gets_its_line_and_no_status_line_before_it(mine):
    child = mine("if run.step == 3:\n    print('got', input('How? ').upper())")
    child.expect("How[?] ")
    assert "step" not in seen(child.before).splitlines()[-1]
    child.sendline("quit")
    child.expect("got QUIT\r\n")
    child.expect(r"step \d\d+/")
    child.sendline("q")
    child.expect("Graceful exit completed!")
    finish(child)


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


def test_nothing_that_the_loop_prints_sticks_to_the_status_line(mine):
    child = mine(
        """
        time.sleep(0.02)
        if run.step % 10 == 0:
            print("printed", run.step)
            print("printed", "too", flush=True)
            print("logged", file=sys.stderr)
            logger.warning("a warning")
            warnings.warn("another")
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
        """
    )
    text = ""
    for _ in range(3):
        child.expect("its other half")
        text += child.before + child.after
    os.kill(child.pid, signal.SIGTERM)
    text += finish(child)
    lines = seen(text).splitlines()
    assert "step " in text and not [line for line in lines if "step " in line]
    whole = r"printed (\d+|too)|logged|a warning|bar 3 of 3|half a line, its other half"
    pieces = re.compile("printed|logged|a warning|bar 3|half")
    assert {
        line for line in lines if pieces.search(line) and not re.fullmatch(whole, line)
    } == set()
    assert {"printed too", "logged", "a warning", "bar 3 of 3"} <= set(lines)
    assert "half a line, its other half" in lines


def test_standard_output_is_what_it_was(mine):
    child = mine(
        "if run.step == 5:\n    print('THE SAME', first == output() and first[2])\n    break"
    )
    child.expect("THE SAME True\r\n")
    finish(child)
    assert child.exitstatus == 0


# ---- sweeps and notebooks


def body(run: tg.Run, loss) -> None:
    """The rest of a loop's body."""


def program(body=body, rates=(0.1,)):
    """A person's train(run), whose loop ends with body(run, loss)."""

    def train(run: tg.Run) -> None:
        run.data(torch.randn(32, 4), torch.randn(8, 4))
        model = run.model(nn.Sequential(*(nn.Linear(4, 4) for _ in rates)))
        groups = [{"params": one.parameters(), "lr": lr} for one, lr in zip(model, rates)]
        optimizer = run.keep(optimizer=torch.optim.SGD(groups))
        for batch in run.batches(lambda batch: {"loss": model(batch).square().mean(1)}):
            optimizer.zero_grad()
            loss = model(batch).square().mean()
            loss.backward()
            optimizer.step()
            run.log(loss=loss)
            body(run, loss)

    return train


def go(directory, train, *args, **options) -> tg.Run:
    argv = ["--no-keyboard", "--checkpoint-dir", str(directory), *map(str, args)]
    return tg.main(train, argv=argv, **{"batch_size": 4, "steps": 8, "log_every": 1, **options})


def test_main_with_argv_returns_the_run(tmp_path):
    run = go(tmp_path / "a", program())
    assert run.completed and run.exit_code == 0 and run.step == 8
    assert run.saved == tmp_path / "a" / "final.pt" and run.best > 0

    def leaves(run, loss):
        if run.step == 3:
            ask_to_leave(run)

    left = go(tmp_path / "b", program(leaves))
    assert not left.completed and left.exit_code == 143 and left.step == 4
    assert left.saved == tmp_path / "b" / "emergency_exit" / "emergency_step_4.pt"
    done = go(tmp_path / "b", program(), "--resume", "latest")
    assert done.completed and done.best == run.best


class Pruned(Exception):
    """As a search for good options raises it for a run that is not worth its time."""


def test_an_exception_of_the_body_comes_through_once_its_state_is_safe(tmp_path, capfd):
    def prunes(run, loss):
        if run.step == 5:
            raise Pruned("bad")

    def early(run, loss):
        prunes(run, loss)

    def train(run):
        for batch in whole(run):
            if run.step == 5:
                raise Pruned("bad")
            step(batch)

    def whole(run):
        run.data(torch.randn(32, 4))
        model = run.model(nn.Linear(4, 1))
        optimizer = run.keep(optimizer=torch.optim.SGD(model.parameters(), 0.1))
        step.parts = model, optimizer
        return run.batches()

    def step(batch):
        model, optimizer = step.parts
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    with pytest.raises(Pruned, match="bad"):
        go(tmp_path, train)
    saved = tg.load_checkpoint(tmp_path / "emergency_exit" / "emergency_step_5.pt")
    assert saved["exit_reason"] == "exception_Pruned"
    said = capfd.readouterr()
    assert "Resume with" in said.out and not said.err
    # After the step of an optimizer it comes through too, and nothing is saved of its batch.
    with pytest.raises(Pruned):
        go(tmp_path / "other", program(early))
    assert not (tmp_path / "other" / "emergency_exit").exists()


def test_a_request_in_the_batch_that_raises_ends_the_sweep_too(tmp_path):
    def body(run, loss):
        if run.step == 3:
            ask_to_leave(run)
            raise Pruned

    with pytest.raises(SystemExit, match="143"):
        go(tmp_path, program(body))


def test_a_random_search_goes_on_between_its_runs(tmp_path):
    """The seed of a run is for what is in it."""
    drawn = set()
    for number in range(4):
        drawn |= {random.random(), np.random.rand(), torch.rand(1).item()}
        go(tmp_path / str(number), program())
    assert len(drawn) == 12


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_request_that_is_swallowed_before_the_loop_is_heard_in_it(tmp_path, capfd):
    """Python swallows what is raised in __del__."""

    class Waits:
        def __del__(self) -> None:
            ask_to_leave(run_of.pop())
            threading.Event().wait(1)

    run_of: list[tg.Run] = []

    def train(run):
        run_of.append(run)
        Waits()
        program()(run)

    run = go(tmp_path, train)
    assert run.exit_code == 143 and run.step == 0
    assert capfd.readouterr().out.count("Exit requested") == 1


def test_a_finished_run_that_is_resumed_still_says_where_it_is(tmp_path):
    first = go(tmp_path, program())
    again = go(tmp_path, program(), "--resume", "latest")
    assert again.completed and again.saved == first.saved and again.best == first.best


def test_what_is_typed_at_an_interpreter_is_its_own(tmp_path):
    """Without argv too, for sys.argv is not the cell's; nothing of it is lost, and nothing ends."""
    lines = ["import torch, train_graceful as tg", "from test_guest import program", "number = 40"]
    words = "checkpoint_dir=tg.option('ck', fixed=False), batch_size=4, steps=2000"
    lines += [f"run = tg.main(program(), {words})", "q = 'mine'", "q", "print(run.step, number)"]
    paths = os.pathsep.join(sys.path)
    result = subprocess.run(
        [sys.executable, "-i", "-c", "import sys; sys.ps1 = sys.ps2 = ''"],
        input="\n".join(lines) + "\n",
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and "'mine'\n2000 40\n" in result.stdout, result
    assert "Send it SIGTERM to exit" in result.stdout


def test_a_mistake_is_raised(tmp_path):
    with pytest.raises(tg.UserError, match="--steps"):
        go(tmp_path, program(), "--steps", "x")
    with pytest.raises(tg.UserError, match="before the loop"):
        go(tmp_path, program(lambda run, loss: run.keep(late=nn.Linear(1, 1))))
    with pytest.raises(SystemExit, match="7"):
        go(tmp_path, program(lambda run, loss: sys.exit(7)))
    with pytest.raises(SystemExit, match="0"):
        go(tmp_path, program(), "--help")


def test_in_another_thread_one_line_says_where_to_call_it(capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mine.py"])
    found = []

    def call(**given):
        try:
            tg.main(program(), **given)
        except BaseException as error:
            found.append(error)

    for given in ({"argv": []}, {}):
        thread = threading.Thread(target=call, kwargs=given)
        thread.start()
        thread.join()
    assert isinstance(found[0], tg.UserError) and "main thread" in str(found[0])
    assert found[1].code == 2 and capfd.readouterr().err.startswith("error: main() hears signals")


def everything() -> dict:
    """What a process holds beside memory."""
    gc.collect()
    return {
        "threads": {thread.name for thread in threading.enumerate()},
        "descriptors": sorted(os.listdir("/proc/self/fd")),
        "handlers": {signum: signal.getsignal(signum) for signum in signal.valid_signals()},
        "wake-up": signal.set_wakeup_fd(signal.set_wakeup_fd(-1)),
        "children": multiprocessing.active_children(),
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
    }


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_hundred_runs_in_a_process_leave_nothing_behind(tmp_path, capfd):
    def ends(run, loss):
        if run.step == 2 and number % 4 == 1:
            ask_to_leave(run)
        if run.step == 2 and number % 4 == 2:
            raise Pruned

    def one(number):
        workers = 2 * (number % 10 == 0)
        try:
            go(tmp_path / str(number % 7 + 10 * (number % 4)), program(ends), "--workers", workers)
        except Pruned:
            assert number % 4 == 2
        if number % 4 == 3:
            with pytest.raises(tg.UserError):
                go(tmp_path / "none", program(), "--resume", "latest")

    for number in range(4):
        one(number)
    before = everything()
    for number in range(4, 100):
        one(number)
    assert everything() == before


def test_stop_pressed_twice_ends_the_call_and_not_the_process(tmp_path, capfd):
    """A notebook's Stop is a SIGINT; also before the loop and after it, where nothing is to be saved."""

    def interrupt(run):
        os.kill(os.getpid(), signal.SIGINT)

    def stays(run, loss):
        interrupt(run)
        threading.Event().wait(0.7)
        interrupt(run)
        threading.Event().wait(60)

    def before(run):
        interrupt(run)
        threading.Event().wait(60)

    def after(run):
        program()(run)
        before(run)

    for train, words in (
        (program(stays), "Second Ctrl-C: leaving without saving"),
        (before, "there is nothing to save"),
        (after, "Everything is saved already"),
    ):
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path, train)
        assert words in capfd.readouterr().out
        assert not (tmp_path / "emergency_exit").exists()
    assert go(tmp_path, program()).completed


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
    assert go(tmp_path, program()).completed
    assert page.text.startswith("🧠 Sequential") and page.text.endswith("final.pt\n")
    assert "step 8/8 | loss" in page.text and "\r" not in page.text
    assert capfd.readouterr() == ("", "")


# ---- rows, rates, checkpoints


def test_each_row_is_given_to_on_row(tmp_path):
    rows = []

    def train(run):
        run.on_row = rows.append
        program(rates=(0.1, 0.02, 0.3))(run)

    go(tmp_path, train, "--eval-every", 4)
    written = metrics_without_times(tmp_path)
    assert [row["step"] for row in rows] == [*range(1, 9)]
    assert [{k: str(row.get(k, "")) for k in written[0]} for row in rows] == written
    rates = rows[0]["lr_optimizer"], rows[0]["lr_optimizer.1"], rows[0]["lr_optimizer.2"]
    assert rates == (0.1, 0.02, 0.3)


def test_a_row_that_on_row_could_not_take_comes_again(tmp_path):
    def train(run):
        def fails(row):
            rows.append(row)
            if row["step"] == 3 and not run.resumed:
                raise OSError("no network")

        run.on_row = fails
        program()(run)

    rows: list[dict] = []
    with pytest.raises(OSError, match="no network"):
        go(tmp_path, train)
    go(tmp_path, train, "--resume", "latest")
    assert [row["step"] for row in rows] == [1, 2, 3, *range(3, 9)]
    assert rows[2]["loss"] == rows[3]["loss"]
    assert [row["loss"] for row in metrics_without_times(tmp_path)][2] == str(rows[2]["loss"])


def test_emergency_checkpoints_are_kept_as_periodic_ones_are(tmp_path):
    """But for the one that was named last, which a person may want any day."""

    def leaves(run, loss):
        if run.step % 5 == 4:
            ask_to_leave(run)

    options = {"save_every": 2, "keep": 2, "steps": 60}
    run = go(tmp_path, program(leaves), **options)
    for _ in range(7):
        named = run.saved
        run = go(tmp_path, program(leaves), "--resume", "auto", **options)
        assert run.exit_code == 143 and run.saved.exists() and named.exists()
    steps = sorted(os.listdir(tmp_path / "emergency_exit"))
    assert steps == ["emergency_step_35.pt", "emergency_step_40.pt"]
    go(tmp_path, program(), "--resume", "latest", "--keep", 1, **options)
    assert os.listdir(tmp_path / "emergency_exit") == ["emergency_step_40.pt"]
    assert sorted(p.name for p in tmp_path.glob("step_*.pt")) == ["step_60.pt"]


# ---- no temporary directory

READ_ONLY = """
mount --bind "$1" /mnt
for folder in /tmp /var/tmp; do mount --bind $folder $folder; mount -o remount,ro,bind $folder; done
cd /tmp
shift
exec "$@"
"""
NAMESPACE = ["unshare", "--map-root-user", "--mount"]


def can_unshare() -> bool:
    there = shutil.which("unshare") and os.path.isdir("/mnt")
    return bool(there) and subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_unshare(), reason="needs a namespace of its own")
def test_without_any_temporary_directory_it_trains(options, tmp_path):
    """A read-only root with one volume: PyTorch's compiler, which Adam imports, wants one."""
    words = [sys.executable, str(SCRIPT), *options, "--checkpoint-dir", "/mnt/ck", "--workers", "1"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("TMPDIR", None)
    for more in (["--steps", "3"], ["--steps", "5", "--resume", "/mnt/ck/final.pt"]):
        command = [*NAMESPACE, "sh", "-ec", READ_ONLY, "sh", str(tmp_path), *words, *more]
        result = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment
        )
        assert result.returncode == 0 and not result.stderr, result.stderr
    assert tg.load_checkpoint(tmp_path / "ck" / "final.pt")["step"] == 5
    assert not list((tmp_path / "ck").glob("pymp-*"))


# ---- what a new user is told


def lengths(run: tg.Run) -> None:
    """Samples of different lengths, which need a collate function."""
    run.data([torch.ones(1 + n % 3, 4) for n in range(8)])
    run.model(nn.Linear(4, 1))
    for _ in run.batches():
        raise AssertionError("there is no batch")


def given(**arguments):
    return lambda run: run.data([torch.ones(4)] * 8, **arguments)


def loader(**arguments):
    return torch.utils.data.DataLoader([torch.ones(4)] * 8, **arguments)


@pytest.mark.parametrize(
    ("train", "line"),
    {
        "collate_fn": (given(collate_fn=list), "run.data(collate_fn=...): it has collate=, "),
        "no collate": (lengths, "run.data(collate=...) is needed: "),
        "loader": (lambda run: run.data(loader()), "give it the dataset of your DataLoader"),
        "validation loader": (given(validation=loader()), "give it the dataset of your DataLoader"),
    }.values(),
    ids=["collate_fn", "no collate", "loader", "validation loader"],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_with_the_data_is_answered_with_what_to_write(tmp_path, train, line, workers):
    with pytest.raises(tg.UserError) as error:
        go(tmp_path, train, "--workers", workers)
    assert line in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.pt"))


def test_an_exception_before_anything_is_trained_saves_nothing(tmp_path, capfd):
    """Not of a fresh run and not of a resumed one, whose checkpoint is named instead."""

    def train(run):
        run.data(torch.randn(32, 4))
        run.model(nn.Linear(4, 1))
        for _ in run.batches():
            raise ValueError("of the first batch")

    with pytest.raises(ValueError, match="first batch"):
        go(tmp_path, train)
    assert not list(tmp_path.rglob("*.pt"))

    def trains(run):
        run.data(torch.randn(32, 4))
        run.model(nn.Linear(4, 1))
        for _ in run.batches():
            if run.step == 2 and not run.resumed:
                ask_to_leave(run)
            if run.resumed:
                raise ValueError("of the first batch")

    left = go(tmp_path, trains)
    capfd.readouterr()
    with pytest.raises(ValueError, match="first batch"):
        go(tmp_path, trains, "--resume", "latest")
    assert list(tmp_path.rglob("*.pt")) == [left.saved]
    assert f"Newest whole checkpoint: {left.saved}\n" in capfd.readouterr().out


def test_a_misspelt_option_of_main_is_not_another_one(tmp_path):
    with pytest.raises(tg.UserError, match=r"main\(batchsize=...\): batch_size is meant"):
        tg.main(program(), argv=[], batchsize=4)


def test_another_number_of_threads_is_said(tmp_path, capfd):
    def leaves(run, loss):
        if run.step == 3:
            ask_to_leave(run)

    threads = torch.get_num_threads()
    go(tmp_path, program(leaves))
    try:
        torch.set_num_threads(threads + 1)
        go(tmp_path, program(), "--resume", "latest")
    finally:
        torch.set_num_threads(threads)
    now, then = f"{threads + 1} threads, 1 processes", f"{threads} threads, 1 processes"
    assert f"⚙️ Changed: {now} (was {then}).\n" in capfd.readouterr().out


@pytest.mark.parametrize("forgotten", ["optimizer", "scheduler"])
def test_what_is_not_kept_is_named_though_something_else_is(tmp_path, forgotten):
    """An average of the weights, say, which has no optimizer of anybody's."""

    def train(run):
        run.data(torch.randn(32, 4))
        model = run.model(nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
        parts = {"optimizer": optimizer, "scheduler": scheduler}
        del parts[forgotten]
        run.keep(ema=torch.optim.swa_utils.AveragedModel(run.module), **parts)
        for batch in run.batches():
            model(batch).square().mean().backward()
            optimizer.step()

    with pytest.raises(tg.UserError, match="not kept"):
        go(tmp_path, train)
    assert not list(tmp_path.rglob("*.pt"))


def test_help_says_each_default_once(capsys):
    with pytest.raises(SystemExit):
        tg.main(tg.train, argv=["--help"], **tg.OPTIONS)
    text = " ".join(capsys.readouterr().out.split())
    assert not re.search(r"\(default [^)]*\) \(default", text)
    assert "--batch-size BATCH_SIZE samples, over all processes, unless the script says" in text


def test_an_average_of_a_wrapped_model_is_refused(tmp_path, group):
    """It would fit no other number of processes."""

    def train(run):
        run.data(torch.randn(32, 4))
        model = run.model(nn.Linear(4, 1))
        run.keep(ema=torch.optim.swa_utils.AveragedModel(model))

    texts, codes = finished(
        group(2, "--checkpoint-dir", tmp_path, program=lambda: tg.main(train, steps=3))
    )
    assert codes == [2, 2] and "make it of run.module, which fits any number" in texts[0]
