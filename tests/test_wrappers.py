"""The shell scripts and make start any script, in the background too, and stop.sh ends its run.

Where something is missing or wrong they say so in a line, and no stranger's process is signalled.
"""

import os
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ENDLESS, ROOT, SCRIPT, alive, by_script, finish, wait_until

COMMON = ROOT / "scripts" / "common.sh"
SCRIPTS = sorted({*(ROOT / "scripts").glob("*.sh")} - {COMMON})
# Holds a directory's run.lock as a run does, answers SIGTERM by saying so and by nothing else, and
# leaves when its input ends: with the outcome that it read, if it read one.
HOLDER = """
import fcntl, os, signal, sys
directory, host = sys.argv[1:]
signal.alarm(60)
lock = open(directory + "/run.lock", "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
print(os.getpid(), host or os.uname().nodename, file=lock, flush=True)
signal.signal(signal.SIGTERM, lambda signum, frame: print("asked", flush=True))
print("holding", flush=True)
lock.write(sys.stdin.read())
"""
# Two runs' threads spin against each other on a small machine.
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
MAKE = ["make", "-C", str(ROOT), f"VENV_PYTHON={sys.executable}", "-o", ".venv/installed"]
QUIET = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 120}


def script(name, *args, root=ROOT, cwd=None, **environment) -> subprocess.CompletedProcess:
    """A wrapper run to its end, without a terminal."""
    command = [str(root / "scripts" / name), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env={**ENVIRONMENT, **environment}, **QUIET)


def make(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([*MAKE, *words], env=ENVIRONMENT, **QUIET)


@pytest.fixture
def spaced(tmp_path, corpus) -> Path:
    """A copy of the program, its scripts and a corpus in a directory with spaces in its name."""
    root = tmp_path / "a copy with spaces"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    for file in (SCRIPT, ROOT / "Makefile", ROOT / "requirements.txt"):
        shutil.copy(file, root)
    shutil.copy(corpus, root / "my corpus.txt")
    return root


MINE = """
import torch, train_graceful as tg

def train(run):
    run.data(list(range(640)))
    model = run.model(torch.nn.Linear(1, 1))
    optimizer = run.keep(optimizer=torch.optim.SGD(model.parameters(), run.options.lr))
    for batch in run.batches():
        optimizer.zero_grad()
        loss = model(batch[:, None].float() / 640).square().mean()
        loss.backward()
        optimizer.step()
        run.log(loss=loss)

if __name__ == "__main__":
    tg.main(train, lr=0.1, steps=1000000)
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
def nohup(tmp_path, options):
    """nohup(root) starts a run in the background; its pid. It is killed after the test."""
    pids = []

    def start(root=ROOT) -> int:
        words = [*options, *ENDLESS, "--log-every", "1"]
        result = script("train_nohup.sh", *words, root=root, LOG=str(tmp_path / "train.log"))
        assert result.returncode == 0, result.stderr
        pids.append(int(re.search(r"pid (\d+)", result.stdout)[1]))
        assert f'tail -f "{tmp_path}/train.log"' in result.stdout
        assert f'"{root}/scripts/stop.sh" "{tmp_path}/ck"' in result.stdout
        return pids[-1]

    yield start
    for pid in pids:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_a_nohup_run_survives_a_hangup_and_stop_makes_it_save_and_leave(nohup, spaced, tmp_path):
    """Where paths have spaces, too."""
    pid = nohup(spaced)
    os.kill(pid, signal.SIGHUP)
    log = tmp_path / "train.log"
    steps = log.read_text().count("\nstep")
    wait_until(lambda: log.read_text().count("\nstep") > steps + 1)
    assert "Training started. Send it SIGTERM to exit gracefully" in log.read_text()
    result = script("stop.sh", tmp_path / "ck", root=spaced)
    assert (result.returncode, result.stderr) == (0, "")
    assert "\n📊 Training Summary:\n   Completed Steps: " in result.stdout
    assert Path(re.search(r"Emergency checkpoint: (.+)", result.stdout)[1]).is_file()
    wait_until(lambda: not alive(pid), timeout=5)
    assert script("stop.sh", tmp_path / "ck").returncode == 2


def test_a_script_of_ones_own_is_started_stopped_and_resumed_where_it_lies(mine):
    started = script("train_nohup.sh", "--lr", "0.2", cwd=mine, SCRIPT="mine.py")
    assert started.returncode == 0, started.stderr
    stopped = script("stop.sh", cwd=mine, SCRIPT="mine.py")
    assert stopped.returncode == 0 and "Emergency checkpoint: " in stopped.stdout, stopped.stderr
    assert list((mine / "checkpoints" / "emergency_exit").glob("*.pt"))
    command = re.search("Resume with: (.*)", stopped.stdout)[1]
    process = subprocess.Popen(
        ["sh", "-c", command.replace("PYTHONPATH", "exec env PYTHONPATH")],
        **{"cwd": mine, "env": ENVIRONMENT, "stdin": subprocess.DEVNULL},
        **{"stdout": subprocess.PIPE, "text": True},
    )
    assert any("Resumed at step" in line for line in process.stdout)
    process.terminate()
    process.communicate()
    assert process.returncode == 143


def test_a_nohup_start_that_fails_shows_the_error_and_returns_its_exit_code(tmp_path):
    (tmp_path / "train.log").write_text("Training started, last week\n")
    result = script("train_nohup.sh", "--steps", "many", LOG=str(tmp_path / "train.log"))
    assert (result.returncode, result.stdout) == (2, "")
    assert "error: argument --steps" in result.stderr and "last week" not in result.stderr


@pytest.fixture
def holder(tmp_path):
    """holder(host) starts a process that holds tmp_path/run.lock; it is killed after the test."""
    processes = []

    def start(host="") -> subprocess.Popen:
        command = [sys.executable, "-c", HOLDER, str(tmp_path), host]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, **pipes))
        assert processes[-1].stdout.readline() == "holding\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("directory", ["never used", "empty", "left"])
def test_stop_without_a_run_says_so_and_changes_nothing(tmp_path, directory):
    (tmp_path / "empty").mkdir()
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / "run.lock").write_text("1 host\n143\nsummary\n")
    before = sorted(tmp_path.rglob("*"))
    result = script("stop.sh", tmp_path / directory)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "left" / "run.lock").read_text() == "1 host\n143\nsummary\n"


@pytest.mark.parametrize("held", [False, True])
def test_stop_never_signals_a_stranger_whom_the_lock_file_names(holder, tmp_path, held):
    """A dead run has left its pid behind, or somebody has written another than the holder's."""
    run = holder() if held else None
    with subprocess.Popen(["sleep", "600"]) as stranger:
        (tmp_path / "run.lock").write_text(f"{stranger.pid} {os.uname().nodename}\n")
        result = script("stop.sh", tmp_path)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1)
        assert stranger.poll() is None
        stranger.kill()
    assert run is None or "stop it there" in result.stderr and run.communicate()[0] == ""


def test_stop_leaves_a_run_on_another_host_alone(holder, tmp_path):
    run = holder("elsewhere")
    result = script("stop.sh", tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1) and "elsewhere" in result.stderr
    assert run.communicate()[0] == ""


OUTCOMES = {"143": 0, "0": 0, "1": 1, "130": 130, "killed": 1}


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_stop_returns_the_outcome_of_the_run_and_wakes_it_if_it_was_suspended(
    holder, tmp_path, outcome
):
    run = holder()
    if outcome == "0":
        os.kill(run.pid, signal.SIGSTOP)
    command = [ROOT / "scripts" / "stop.sh", tmp_path]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=ENVIRONMENT, **pipes) as stop:
        # One that is not woken is killed, lest this waits for ever.
        if not select.select([run.stdout], [], [], 30)[0]:
            run.kill()
        assert run.stdout.readline() == "asked\n"
        if outcome == "killed":
            run.kill()
            assert "died without a word" in stop.communicate()[1]
        else:
            run.communicate(f"{outcome}\nsummary\nof it\n")
            output, errors = stop.communicate()
            assert output.endswith("\nsummary\nof it\n") and errors == ""
    assert stop.returncode == OUTCOMES[outcome]


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("nsenter"), reason="needs root, nsenter")
def test_a_run_that_is_pid_1_of_a_container_is_stopped_from_inside(options, tmp_path):
    """As docker exec CONTAINER scripts/stop.sh does: nothing there outlives its pid 1."""
    command = [*"unshare -pf --mount-proc".split(), sys.executable, str(SCRIPT), "--no-keyboard"]
    with open(tmp_path / "out", "w") as out:
        streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
        container = subprocess.Popen([*command, *options, *ENDLESS], **streams)
    wait_until(lambda: "step " in (tmp_path / "out").read_text(), container)
    inside = subprocess.run(["pgrep", "-P", str(container.pid)], **QUIET).stdout.strip()
    stop = [str(ROOT / "scripts" / "stop.sh"), str(tmp_path / "ck")]
    enter = ["nsenter", "-t", inside, "-p", "-m"]
    asked = subprocess.run([*enter, *stop], env=ENVIRONMENT, **QUIET)
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

    def train(self, *args, root=ROOT, code=0) -> str:
        command = [str(root / "scripts" / "train_tmux.sh"), *args]
        result = subprocess.run(command, env=self.environment, **QUIET)
        assert result.returncode == code, result.stderr
        return result.stdout + result.stderr

    def type(self, *keys: str, session="train") -> None:
        self("send-keys", "-t", f"={session}:", *keys)

    def screen(self) -> str:
        return self("capture-pane", "-p", "-J", "-S", "-", "-t", "=train:")

    def waits_for(self, text: str, without: str = "nothing like that") -> None:
        wait_until(lambda: text in self.screen() and without not in self.screen())


@pytest.fixture
def tmux(tmp_path_factory):
    server = Tmux(tmp_path_factory.mktemp("tmux"))
    yield server
    pids = server("list-panes", "-a", "-F", "#{pane_pid}").split()
    server("kill-server")
    wait_until(lambda: not any(alive(int(pid)) for pid in pids))


def test_q_typed_in_tmux_leaves_a_readable_summary_above_a_usable_shell(tmux, spaced, options):
    words = [*options, "--data", "my corpus.txt", *ENDLESS]
    started = tmux.train(*words, root=spaced)
    assert "tmux attach -t 'train'" in started and "Ctrl-b d" in started
    tmux.waits_for("Training started")
    tmux.type("q", "Enter")
    tmux.waits_for("exit code 0")
    screen = tmux.screen()
    assert "Training Summary:" in screen and "Completed Steps: " in screen
    assert Path(re.search(r"Emergency checkpoint: (/.+\.pt)", screen)[1]).is_file()
    tmux.type("echo usable $((40 + 2))", "Enter")
    tmux.waits_for("usable 42")
    # The next one takes nothing away that is still read there.
    assert "Started in a new window" in tmux.train(*words, root=spaced)
    tmux.waits_for("Training started", without="usable")
    assert "nothing new is started" in tmux.train(root=spaced)
    tmux.type("q", "Enter")
    tmux.waits_for("exit code 0")
    assert tmux("list-windows", "-t", "=train:").count("\n") == 2


def test_a_second_start_attaches_to_the_session_and_ctrl_c_there_saves(
    tmux, spawn, mine, monkeypatch
):
    monkeypatch.chdir(mine)
    tmux.environment["SCRIPT"] = "mine.py"
    tmux.train("train", "--lr", "0.2")
    tmux.waits_for("Training started")
    assert "already; nothing new is started" in tmux.train("train")
    # With options it is another run that is wanted: attached to this one, nobody would see that.
    assert "SESSION=name" in tmux.train("train", "--lr", "0.2", code=2)
    assert tmux("list-panes", "-a").count("\n") == 1
    child = spawn(command=["sh", str(ROOT / "scripts" / "train_tmux.sh")], env=tmux.environment)
    # What was printed before is not waited for: tmux discards what its terminal has not taken yet.
    child.expect("Training started")
    child.send("\x03")
    tmux.waits_for("exit code 130")
    assert f"Emergency checkpoint: {mine}/checkpoints/emergency_exit" in tmux.screen()
    tmux("detach-client", "-s", "=train")
    finish(child)
    assert child.exitstatus == 0


def test_inside_tmux_the_client_is_switched_not_nested(tmux, spawn):
    tmux("new-session", "-d", "-s", "work", "/bin/sh")
    client = spawn(command=["tmux", "attach", "-t", "work"], env=tmux.environment)
    client.expect("work")
    tmux.type(f"PYTHON=false '{ROOT}/scripts/train_tmux.sh'", "Enter", session="work")
    wait_until(lambda: tmux("list-clients", "-F", "#{client_session}") == "train\n")
    tmux.waits_for("exit code 1")


# ---- torchrun and make


def test_a_script_of_ones_own_with_several_processes(mine, spawn):
    child = by_script(spawn, 2, cwd=mine, SCRIPT="mine.py")
    child.expect("on 2 x cpu")
    child.expect("step [0-9]+/")
    child.sendline("q")
    again = r"Resume with: SCRIPT=.*mine.py'? \S*scripts/train_torchrun.sh 2 --resume"
    assert re.search(again, finish(child)) and child.exitstatus == 0


@pytest.mark.parametrize("number", ["0", "x", "2x", ""])
def test_torchrun_is_not_started_with_a_number_of_processes_that_is_none(number):
    result = script("train_torchrun.sh", number, PYTHON="false")
    said = f"'{number}' is no number of processes: a number from 1 on, or auto\n"
    assert (result.returncode, result.stderr) == (2, said)


@pytest.mark.parametrize("way", ["q", "Ctrl-C", "make stop"])
def test_a_run_that_has_saved_and_left_is_no_error_to_make(spawn, mine, way):
    where = f"ARGS=--lr 0.2 --checkpoint-dir '{mine}/ck'"
    own = f"SCRIPT={mine / 'mine.py'}"
    child = spawn(command=[*MAKE, "train", own, where], env=ENVIRONMENT)
    child.expect("step [0-9]+/")
    if way == "q":
        child.sendline("q")
    elif way == "Ctrl-C":
        child.sendintr()
    else:
        assert "Emergency checkpoint: " in make("stop", where).stdout
    said = finish(child)
    assert "Resume with" in said and "make: ***" not in said
    # By the rules make itself ends with Ctrl-C, so that what follows it in a script is not begun.
    assert (child.exitstatus, child.signalstatus) == ((None, 2) if way == "Ctrl-C" else (0, None))
    if way == "q":
        [saved] = (mine / "ck" / "emergency_exit").glob("*.pt")
        result = make("resume", own, f"CKPT={saved}", "ARGS=--lr 0.3")
        assert "--lr 0.3 does not fit the checkpoint, whose run has --lr 0.2" in result.stderr
        assert "Error 2" in result.stderr


# ---- all of them


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help_is_the_first_comment(path):
    result = script(path.name, "--help")
    assert (result.returncode, result.stderr) == (0, "") and "#" not in result.stdout
    assert re.match(rf"Usage: (sbatch .*)?scripts/{path.name} ", result.stdout)


@pytest.mark.parametrize("name", ["train_tmux.sh", "train_nohup.sh", "stop.sh"])
def test_a_missing_python_or_tmux_is_one_line_that_says_what_to_install(name, tmp_path):
    for tool in ("sh", "dirname", "sed", "tr"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    (tmp_path / "scripts").mkdir()
    for file in (ROOT / "scripts" / name, COMMON):
        shutil.copy(file, tmp_path / "scripts")
    result = script(name, root=tmp_path, PATH=str(tmp_path), PYTHON="")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "apt install" in result.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing():
    files = [*SCRIPTS, COMMON, ROOT / ".ci" / "run"]
    assert subprocess.run(["shellcheck", *files], **QUIET).stdout == ""
