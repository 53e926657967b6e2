"""The shell scripts and make start any script, in the background too, and stop.sh ends its run.

Where something is wrong they say so in a line, and no stranger's process is signalled.
"""

import os
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import helpers as h
import pytest

SCRIPTS = sorted({*(h.ROOT / "scripts").glob("*.sh")} - {h.ROOT / "scripts" / "common.sh"})
# Holds a directory's run.lock as a run does, answers SIGTERM by saying so and by nothing else, and
# leaves when its input ends: with the outcome that it read, if it read one.
HOLDER = """
import fcntl, os, signal, sys
signal.alarm(60)
lock = open(sys.argv[1], "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
print(os.getpid(), os.uname().nodename, file=lock, flush=True)
signal.signal(signal.SIGTERM, lambda signum, frame: print("asked", flush=True))
print("holding", flush=True)
lock.write(sys.stdin.read())
"""
# Two runs' threads spin against each other on a small machine.
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
QUIET = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 120}


def script(name, *args, cwd=None, **environment) -> subprocess.CompletedProcess:
    """A wrapper run to its end, without a terminal."""
    command = [str(h.ROOT / "scripts" / name), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env={**ENVIRONMENT, **environment}, **QUIET)


def make(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([*h.MAKE, *words], env=ENVIRONMENT, **QUIET)


MINE = """
import torch, train_graceful as tg

def train(run):
    model = run.model(torch.nn.Linear(1, 1))
    optimizer = run.keep(optimizer=torch.optim.SGD(model.parameters(), run.options.lr))
    for step in run.batches():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 1)).square().mean()
        loss.backward()
        optimizer.step()
        run.log(loss=loss)

tg.main(train, lr=0.1, note="", steps=1000000)
"""


@pytest.fixture
def mine(tmp_path) -> Path:
    """A folder elsewhere with a script that imports train_graceful, and nothing else."""
    folder = tmp_path / "a folder of mine"
    folder.mkdir()
    (folder / "mine.py").write_text(MINE)
    return folder


# ---- nohup and stop


@pytest.fixture
def killed():
    """The processes in this list are gone after the test."""
    pids: list[int] = []
    yield pids
    for pid in filter(h.alive, pids):
        os.kill(pid, signal.SIGKILL)


def test_a_nohup_run_survives_a_hangup_and_stop_makes_it_save_and_leave(mine, killed):
    """A script of one's own does so where it lies."""
    started = script("train_nohup.sh", "--lr", "0.2", cwd=mine, SCRIPT="mine.py")
    assert started.returncode == 0, started.stderr
    log, said = mine / "checkpoints" / "train.log", started.stdout
    assert f"tail -f '{log}'" in said and f"{h.ROOT}/scripts/stop.sh '{log.parent}'" in said
    pid = int(re.search(r"pid (\d+)", said)[1])
    killed.append(pid)
    os.kill(pid, signal.SIGHUP)
    steps = log.read_text().count("\nstep")
    h.wait_until(lambda: log.read_text().count("\nstep") > steps + 1)
    assert "Training started. Interrupt it or send SIGTERM to exit gracefully" in log.read_text()
    stopped = script("stop.sh", cwd=mine, SCRIPT="mine.py")
    assert (stopped.returncode, stopped.stderr) == (0, "") and not h.alive(pid)
    assert "\n📊 Training Summary:\n   Completed Steps: " in stopped.stdout
    assert Path(re.search(r"Emergency checkpoint: (.+)", stopped.stdout)[1]).is_file()
    assert script("stop.sh", cwd=mine, SCRIPT="mine.py").returncode == 2


def test_a_nohup_start_that_fails_shows_the_error_and_returns_its_exit_code(tmp_path):
    (tmp_path / "train.log").write_text("Training started, last week\n")
    result = script("train_nohup.sh", "--steps", "many", LOG=str(tmp_path / "train.log"))
    assert (result.returncode, result.stdout) == (2, "")
    assert "error: argument --steps" in result.stderr and "last week" not in result.stderr


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path/run.lock; it is killed after the test."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run.lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes)
    assert process.stdout.readline() == "holding\n"
    yield process
    process.kill()
    process.communicate()


def test_stop_without_a_run_says_so_and_changes_nothing(tmp_path):
    lock = tmp_path / "left" / "run.lock"
    lock.parent.mkdir()
    lock.write_text("1 host\n143\nsummary\n")
    for directory in (tmp_path / "never used", tmp_path / "left", "-h"):
        result = script("stop.sh", directory)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert [*tmp_path.rglob("*")] == [lock.parent, lock]
    assert lock.read_text() == "1 host\n143\nsummary\n"


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("host", [os.uname().nodename, "elsewhere"])
def test_stop_never_signals_a_stranger_whom_the_lock_file_names(
    holder, tmp_path, killed, host, held
):
    """A run on another host has that pid, or a dead one, or somebody has written it there."""
    if not held:
        holder.kill()
        holder.wait()
    stranger = subprocess.Popen(["sleep", "600"])
    killed.append(stranger.pid)
    (tmp_path / "run.lock").write_text(f"{stranger.pid} {host}\n")
    result = script("stop.sh", tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert (f"on {host} or in a container: stop it there" in result.stderr) == held
    assert stranger.poll() is None
    assert holder.communicate()[0] == ""


OUTCOMES = {"143": 0, "0": 0, "1": 1, "130": 130, "killed": 1}


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_stop_returns_the_outcome_of_the_run_and_wakes_it_if_it_was_suspended(
    holder, tmp_path, outcome
):
    if outcome == "0":
        holder.send_signal(signal.SIGSTOP)
    command = [h.ROOT / "scripts" / "stop.sh", tmp_path]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=ENVIRONMENT, **pipes) as stop:
        # One that is not woken is killed, lest this waits for ever.
        if not select.select([holder.stdout], [], [], 30)[0]:
            holder.kill()
        assert holder.stdout.readline() == "asked\n"
        if outcome == "killed":
            holder.kill()
            assert "died without a word" in stop.communicate()[1]
        else:
            holder.communicate(f"{outcome}\nsummary\nof it\n")
            output, errors = stop.communicate()
            assert output.endswith("\nsummary\nof it\n") and errors == ""
    assert stop.returncode == OUTCOMES[outcome]


def test_a_run_that_is_pid_1_of_a_container_is_stopped_from_inside(options, tmp_path, killed):
    """As docker exec CONTAINER scripts/stop.sh does: nothing there outlives its pid 1."""
    namespace = "unshare -pf --kill-child --mount-proc".split()
    if not shutil.which("nsenter") or subprocess.run([*namespace, "true"], **QUIET).returncode:
        pytest.skip("needs the right to make namespaces, and nsenter")
    command = [*namespace, sys.executable, str(h.SCRIPT), "--no-keyboard"]
    with open(tmp_path / "out", "w") as out:
        streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
        container = subprocess.Popen([*command, *options, *h.ENDLESS], **streams)
    killed.append(container.pid)
    h.wait_until(lambda: "step " in (tmp_path / "out").read_text(), container)
    inside = subprocess.run(["pgrep", "-P", str(container.pid)], **QUIET).stdout.strip()
    enter = ["nsenter", "-t", inside, "-p", "-m", h.ROOT / "scripts" / "stop.sh", tmp_path / "ck"]
    asked = subprocess.run(enter, env=ENVIRONMENT, **QUIET)
    assert asked.returncode == 0 and "Asked pid 1 to save and leave" in asked.stderr, asked
    assert container.wait(60) == 143
    assert len(list((tmp_path / "ck" / "emergency_exit").glob("*.pt"))) == 1


# ---- tmux


class Tmux:
    """A private tmux server."""

    def __init__(self, directory: Path) -> None:
        self.environment = {key: value for key, value in ENVIRONMENT.items() if key != "TMUX"}
        self.environment.update(TMUX_TMPDIR=str(directory), SHELL="/bin/sh", TERM="xterm")

    def __call__(self, *args) -> str:
        return subprocess.run(["tmux", *args], env=self.environment, **QUIET).stdout

    def train(self, *args, code=0) -> str:
        command = [str(h.ROOT / "scripts" / "train_tmux.sh"), *args]
        result = subprocess.run(command, env=self.environment, **QUIET)
        assert result.returncode == code, result.stderr
        return result.stdout + result.stderr

    def type(self, *keys: str) -> None:
        self("send-keys", "-t", "=train:", *keys)

    def screen(self) -> str:
        return self("capture-pane", "-p", "-J", "-S", "-", "-t", "=train:")

    def waits_for(self, text: str) -> None:
        h.wait_until(lambda: text in self.screen())


@pytest.fixture
def tmux(tmp_path_factory):
    if not shutil.which("tmux"):
        pytest.skip("tmux is missing")
    server = Tmux(tmp_path_factory.mktemp("tmux"))
    yield server
    pids = server("list-panes", "-a", "-F", "#{pane_pid}").split()
    server("kill-server")
    h.wait_until(lambda: not any(h.alive(int(pid)) for pid in pids))


def test_q_typed_in_tmux_leaves_a_readable_summary_above_a_usable_shell(tmux, options):
    started = tmux.train(*options, *h.ENDLESS)
    assert "tmux attach -t 'train'" in started and "Ctrl-b d" in started
    tmux.waits_for("Training started")
    tmux.type("q", "Enter")
    tmux.waits_for("exit code 0")
    assert Path(re.search(r"Emergency checkpoint: (/.+\.pt)", tmux.screen())[1]).is_file()
    tmux.type("echo usable $((40 + 2))", "Enter")
    tmux.waits_for("usable 42")
    # The next one takes nothing away that is still read there.
    assert "Started in a new window" in tmux.train(*options, *h.ENDLESS)
    assert tmux("list-windows", "-t", "=train:").count("\n") == 2


def test_a_second_start_attaches_and_ctrl_c_there_saves(tmux, spawn, mine, monkeypatch):
    monkeypatch.chdir(mine)
    tmux.environment["SCRIPT"] = "mine.py"
    # To tmux a ; at the end of a word begins another command.
    tmux.train("train", "--lr", "0.2", "--note", "it's ;")
    tmux.waits_for("Training started")
    assert "already; nothing new is started" in tmux.train("train")
    # With options it is another run that is wanted: attached to this one, nobody would see that.
    assert "SESSION=train. One more beside it: " in tmux.train("train", "--lr", "0.2", code=2)
    child = spawn(command=["sh", str(h.ROOT / "scripts" / "train_tmux.sh")], env=tmux.environment)
    # What was printed before is not waited for: tmux discards what its terminal has not taken yet.
    child.expect("Training started")
    child.send("\x03")
    tmux.waits_for("exit code 130")
    assert f"Emergency checkpoint: {mine}/checkpoints/emergency_exit" in tmux.screen()
    tmux("detach-client", "-s", "=train")
    h.finish(child)
    assert child.exitstatus == 0


# ---- torchrun and make


def test_a_script_of_ones_own_with_several_processes(mine, spawn):
    child = h.by_script(spawn, 2, cwd=mine, SCRIPT="mine.py")
    child.expect("on 2 x cpu")
    child.expect("step [0-9]+/")
    child.sendline("q")
    again = r"Resume with: SCRIPT=.*mine.py'? \S*scripts/train_torchrun.sh 2 --resume"
    assert re.search(again, h.finish(child)) and child.exitstatus == 0


@pytest.mark.parametrize("number", ["0", "2x", "", "2"])
def test_torchrun_is_not_started_without_a_number_of_processes_and_a_place_to_meet(number):
    words = {"2": "NNODES=2 needs RENDEZVOUS=host:port"}
    said = words.get(number, f"'{number}' is no number of processes")
    result = script("train_torchrun.sh", number, PYTHON="false", NNODES="2")
    assert result.returncode == 2 and said in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("way", ["q", "Ctrl-C", "make stop"])
def test_a_run_that_has_saved_and_left_is_no_error_to_make(spawn, mine, way):
    where = f"ARGS=--lr 0.2 --checkpoint-dir '{mine}/ck'"
    own = f"SCRIPT={mine / 'mine.py'}"
    child = spawn(command=[*h.MAKE, "train", own, where], env=ENVIRONMENT)
    child.expect("step [0-9]+/")
    if way == "q":
        child.sendline("q")
    elif way == "Ctrl-C":
        child.sendintr()
    else:
        assert "Emergency checkpoint: " in make("stop", where).stdout
    said = h.finish(child)
    assert "Resume with" in said and "make: ***" not in said
    # By the rules make itself ends with Ctrl-C, so that what follows it in a script is not begun.
    assert (child.exitstatus, child.signalstatus) == ((None, 2) if way == "Ctrl-C" else (0, None))
    if way == "q":
        [saved] = (mine / "ck" / "emergency_exit").glob("*.pt")
        result = make("resume", own, f"CKPT={saved}", "ARGS=--lr 0.3")
        assert "--lr 0.3 does not fit the checkpoint, whose run has --lr 0.2" in result.stderr
        assert "Error 2" in result.stderr


def test_make_leaves_the_environment_of_a_script_alone(tmp_path):
    (tmp_path / "mine.py").write_text("import os; print(os.environ['MODE'], os.environ['DIR'])")
    environment = {**ENVIRONMENT, "MODE": "cached", "DIR": "/data"}
    command = [*h.MAKE, "train", f"SCRIPT={tmp_path}/mine.py"]
    result = subprocess.run(command, env=environment, **QUIET)
    assert "\ncached /data\n" in result.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help_is_the_first_comment(path):
    result = script(path.name, "--help")
    assert (result.returncode, result.stderr) == (0, "") and "#" not in result.stdout
    assert re.match(rf"Usage: (sbatch .*)?scripts/{path.name} ", result.stdout)
