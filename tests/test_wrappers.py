"""The shell scripts and make: tmux, nohup, stop."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ENDLESS, ROOT, SCRIPT, by_script, finish, wait_until

SCRIPTS = sorted({*(ROOT / "scripts").glob("*.sh")} - {ROOT / "scripts" / "common.sh"})
WRAPPERS = [ROOT / "scripts" / name for name in ("train_tmux.sh", "train_nohup.sh", "stop.sh")]
# Holds a directory's run.lock as a run does, answers SIGTERM by saying so and by nothing else, and leaves when its
# input ends: with the outcome that it read, if it read one.
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


def script(name, *args, root=ROOT, **environment) -> subprocess.CompletedProcess:
    """A wrapper run to its end, without a terminal."""
    return subprocess.run(
        [str(root / "scripts" / name), *map(str, args)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env={**ENVIRONMENT, **environment},
    )


def stopping(directory: Path) -> subprocess.Popen:
    """stop.sh, under way."""
    return subprocess.Popen(
        [str(ROOT / "scripts" / "stop.sh"), str(directory)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def process_is_gone(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.fixture
def nohup(tmp_path, options):
    """nohup(root) starts a run in the background and returns its pid; it is killed after the test."""
    pids = []

    def start(root=ROOT) -> int:
        result = script(
            "train_nohup.sh",
            *options,
            *ENDLESS,
            "--log-every",
            "1",
            root=root,
            LOG=str(tmp_path / "train.log"),
        )
        assert result.returncode == 0, result.stderr
        pids.append(int(re.search(r"pid (\d+)", result.stdout)[1]))
        assert f'tail -f "{tmp_path}/train.log"' in result.stdout
        assert f'"{root}/scripts/stop.sh" "{tmp_path}/ck"' in result.stdout
        return pids[-1]

    yield start
    for pid in pids:
        if not process_is_gone(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def holder(tmp_path):
    """holder(host) starts a process that holds tmp_path/run.lock; it is killed and reaped after the test."""
    processes = []

    def start(host="") -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path), host],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout.readline() == "holding\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def name_in_lock_file(process: subprocess.Popen, directory: Path) -> None:
    (directory / "run.lock").write_text(f"{process.pid} {os.uname().nodename}\n")


@pytest.fixture
def stranger(tmp_path):
    """A process that is no run, whose pid is in tmp_path/run.lock."""
    with subprocess.Popen(["sleep", "600"]) as process:
        name_in_lock_file(process, tmp_path)
        yield process
        process.kill()


@pytest.fixture
def spaced_root(tmp_path) -> Path:
    """A copy of the program and its scripts in a directory with spaces in its name."""
    root = tmp_path / "a copy with spaces"
    root.mkdir()
    shutil.copytree(ROOT / "scripts", root / "scripts")
    for name in ("train_graceful.py", "Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, root)
    return root


class Tmux:
    """A private tmux server."""

    def __init__(self, directory: Path) -> None:
        self.environment = {key: value for key, value in ENVIRONMENT.items() if key != "TMUX"}
        self.environment.update(TMUX_TMPDIR=str(directory), SHELL="/bin/sh", TERM="xterm")

    def __call__(self, *args) -> str:
        return subprocess.run(
            ["tmux", *args], env=self.environment, capture_output=True, text=True
        ).stdout

    def train(self, *args, root=ROOT) -> str:
        return subprocess.run(
            [str(root / "scripts" / "train_tmux.sh"), *args],
            env=self.environment,
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        ).stdout

    def shows(self, text: str) -> bool:
        return text in self.screen()

    def screen(self) -> str:
        return self("capture-pane", "-p", "-J", "-S", "-", "-t", "=train:")


@pytest.fixture
def tmux(tmp_path_factory):
    server = Tmux(tmp_path_factory.mktemp("tmux"))
    yield server
    pids = server("list-panes", "-a", "-F", "#{pane_pid}").split()
    server("kill-server")
    wait_until(lambda: all(process_is_gone(int(pid)) for pid in pids))


# ---- nohup and stop --------------------------------------------------------------------------------------------------


def test_a_nohup_run_survives_a_hangup_and_stop_makes_it_save_and_leave(nohup, tmp_path):
    pid = nohup()
    os.kill(pid, signal.SIGHUP)
    steps = (tmp_path / "train.log").read_text().count("\nstep")
    wait_until(lambda: (tmp_path / "train.log").read_text().count("\nstep") > steps + 1)
    assert (
        "Training started. Send it SIGTERM to exit gracefully"
        in (tmp_path / "train.log").read_text()
    )
    result = script("stop.sh", tmp_path / "ck")
    assert (result.returncode, result.stderr) == (0, "")
    assert "\n📊 Training Summary:\n   Completed Steps: " in result.stdout
    assert Path(re.search(r"Emergency checkpoint: (.+)", result.stdout)[1]).is_file()
    wait_until(lambda: process_is_gone(pid), timeout=5)
    assert script("stop.sh", tmp_path / "ck").returncode == 2


def test_nohup_and_stop_work_where_paths_have_spaces(nohup, spaced_root, tmp_path):
    nohup(spaced_root)
    assert script("stop.sh", tmp_path / "ck", root=spaced_root).returncode == 0


def test_a_nohup_start_that_fails_shows_the_error_and_returns_its_exit_code(tmp_path):
    (tmp_path / "train.log").write_text("Training started, last week\n")
    result = script("train_nohup.sh", "--steps", "many", LOG=str(tmp_path / "train.log"))
    assert (result.returncode, result.stdout) == (2, "")
    assert "error: argument --steps" in result.stderr and "last week" not in result.stderr


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


def test_stop_never_signals_the_stranger_whose_pid_a_dead_run_left_behind(stranger, tmp_path):
    assert script("stop.sh", tmp_path).returncode == 2
    assert stranger.poll() is None


def test_stop_signals_no_stranger_whom_the_file_names_while_another_holds_it(
    holder, stranger, tmp_path
):
    run = holder()
    name_in_lock_file(stranger, tmp_path)
    result = script("stop.sh", tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (
        2,
        1,
    ) and "stop it there" in result.stderr
    assert stranger.poll() is None and run.communicate()[0] == ""


def test_stop_leaves_a_run_on_another_host_alone(holder, tmp_path):
    run = holder("elsewhere")
    result = script("stop.sh", tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1) and "elsewhere" in result.stderr
    assert run.communicate()[0] == ""


def test_stop_returns_1_when_the_run_is_killed_while_it_waits(holder, tmp_path):
    run = holder()
    with stopping(tmp_path) as stop:
        assert run.stdout.readline() == "asked\n"
        run.kill()
        assert "died without a word" in stop.communicate()[1]
    assert stop.returncode == 1


@pytest.mark.parametrize(("outcome", "code"), [(143, 0), (0, 0), (1, 1), (130, 130)])
def test_stop_returns_the_outcome_of_the_run(holder, tmp_path, outcome, code):
    run = holder()
    with stopping(tmp_path) as stop:
        assert run.stdout.readline() == "asked\n"
        run.communicate(f"{outcome}\nsummary\nof it\n")
        output, errors = stop.communicate()
        assert output.endswith("\nsummary\nof it\n") and errors == ""
    assert stop.returncode == code


def test_stop_wakes_a_run_that_was_suspended(holder, tmp_path):
    run = holder()
    os.kill(run.pid, signal.SIGSTOP)
    with stopping(tmp_path) as stop:
        assert run.stdout.readline() == "asked\n"
        run.communicate("143\nsummary\n")
        assert stop.communicate()[0].endswith("\nsummary\n")
    assert stop.returncode == 0


# ---- tmux ------------------------------------------------------------------------------------------------------------


def test_q_typed_in_tmux_leaves_a_readable_summary_above_a_usable_shell(
    tmux, spaced_root, corpus, options
):
    shutil.copy(corpus, spaced_root / "my corpus.txt")
    started = tmux.train(*options, "--data", "my corpus.txt", *ENDLESS, root=spaced_root)
    assert "tmux attach -t 'train'" in started and "Ctrl-b d" in started
    wait_until(lambda: tmux.shows("Training started"))
    tmux("send-keys", "-t", "=train:", "q", "Enter")
    wait_until(lambda: tmux.shows("exit code 0"))
    screen = tmux.screen()
    assert "Training Summary:" in screen and "Completed Steps: " in screen
    assert Path(re.search(r"Emergency checkpoint: (/.+\.pt)", screen)[1]).is_file()
    tmux("send-keys", "-t", "=train:", "echo usable $((40 + 2))", "Enter")
    wait_until(lambda: tmux.shows("usable 42"))
    # The next one takes nothing away that is still read there.
    assert "Started in a new window" in tmux.train(
        *options, "--data", "my corpus.txt", *ENDLESS, root=spaced_root
    )
    wait_until(lambda: tmux.shows("Training started") and not tmux.shows("usable"))
    assert "nothing new is started" in tmux.train(root=spaced_root)
    tmux("send-keys", "-t", "=train:", "q", "Enter")
    wait_until(lambda: tmux.shows("exit code 0"))
    assert tmux("list-windows", "-t", "=train:").count("\n") == 2


def test_a_second_start_attaches_to_the_session_and_ctrl_c_there_saves(tmux, spawn, options):
    tmux.train("train", *options, *ENDLESS)
    wait_until(lambda: tmux.shows("Training started"))
    assert "already; nothing new is started" in tmux.train("train")
    # With options it is another run that is wanted: attached to this one, nobody would see that it was not started.
    again = subprocess.run(
        [str(ROOT / "scripts" / "train_tmux.sh"), "train", *options],
        env=tmux.environment,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 2 and "SESSION=name" in again.stderr
    assert tmux("list-panes", "-a").count("\n") == 1
    child = spawn(command=["sh", str(ROOT / "scripts" / "train_tmux.sh")], env=tmux.environment)
    # What was printed before is not waited for: tmux discards what its terminal has not taken yet.
    child.expect("Training started")
    child.send("\x03")
    wait_until(lambda: tmux.shows("exit code 130"))
    assert tmux.shows("Emergency checkpoint: ")
    tmux("detach-client", "-s", "=train")
    finish(child)
    assert child.exitstatus == 0


def test_inside_tmux_the_client_is_switched_not_nested(tmux, spawn):
    tmux("new-session", "-d", "-s", "work", "/bin/sh")
    client = spawn(command=["tmux", "attach", "-t", "work"], env=tmux.environment)
    client.expect("work")
    tmux("send-keys", "-t", "=work:", f"PYTHON=false '{ROOT}/scripts/train_tmux.sh'", "Enter")
    wait_until(lambda: tmux("list-clients", "-F", "#{client_session}") == "train\n")
    wait_until(lambda: tmux.shows("exit code 1"))


# ---- a script of one's own --------------------------------------------------------------------------------------------

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


def test_a_script_of_ones_own_in_the_background(mine):
    environment = {**ENVIRONMENT, "SCRIPT": "mine.py"}
    started = subprocess.run(
        [str(ROOT / "scripts" / "train_nohup.sh"), "--lr", "0.2"],
        cwd=mine,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert started.returncode == 0, started.stderr
    stopped = subprocess.run(
        [str(ROOT / "scripts" / "stop.sh")],
        cwd=mine,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert stopped.returncode == 0 and "Emergency checkpoint: " in stopped.stdout, stopped.stderr
    assert list((mine / "checkpoints" / "emergency_exit").glob("*.pt"))
    command = re.search("Resume with: (.*)", stopped.stdout)[1]
    process = subprocess.Popen(
        ["sh", "-c", command.replace("PYTHONPATH", "exec env PYTHONPATH")],
        cwd=mine,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert any("Resumed at step" in line for line in process.stdout)
    process.terminate()
    process.communicate()
    assert process.returncode == 143


def test_a_script_of_ones_own_in_tmux(tmux, mine):
    tmux.environment["SCRIPT"] = "mine.py"
    subprocess.run(
        [str(ROOT / "scripts" / "train_tmux.sh"), "train", "--lr", "0.2"],
        env=tmux.environment,
        cwd=mine,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    wait_until(lambda: tmux.shows("Training started"))
    tmux("send-keys", "-t", "=train:", "q", "Enter")
    wait_until(lambda: tmux.shows("exit code 0"))
    assert tmux.shows(f"Emergency checkpoint: {mine}/checkpoints/emergency_exit")


def test_a_script_of_ones_own_with_several_processes(mine, spawn):
    child = by_script(spawn, 2, cwd=mine, SCRIPT="mine.py")
    child.expect("on 2 x cpu")
    child.expect("step [0-9]+/")
    child.sendline("q")
    output = finish(child)
    assert child.exitstatus == 0 and re.search(
        r"Resume with: SCRIPT=.*mine.py'? \S*scripts/train_torchrun.sh 2 --resume", output
    )


def test_a_script_of_ones_own_by_make(mine, spawn):
    make = [
        "make",
        "-C",
        str(ROOT),
        f"VENV_PYTHON={sys.executable}",
        "-o",
        ".venv/installed",
        f"SCRIPT={mine / 'mine.py'}",
    ]
    child = spawn(
        command=[*make, "train", f"ARGS=--lr 0.2 --checkpoint-dir '{mine}/ck'"], env=ENVIRONMENT
    )
    child.expect("step [0-9]+/")
    child.sendline("q")
    finish(child)
    assert child.exitstatus == 0 and list((mine / "ck" / "emergency_exit").glob("*.pt"))
    result = subprocess.run(
        [
            *make,
            "resume",
            f"CKPT={next((mine / 'ck' / 'emergency_exit').glob('*.pt'))}",
            "ARGS=--lr 0.3",
        ],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert "--lr 0.3 does not fit the checkpoint, whose run has --lr 0.2" in result.stderr


# ---- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help_is_the_first_comment(path):
    result = script(path.name, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert (
        re.match(rf"Usage: (sbatch .*)?scripts/{path.name} ", result.stdout)
        and "#" not in result.stdout
    )


@pytest.mark.parametrize("path", WRAPPERS, ids=lambda path: path.name)
def test_a_missing_python_or_tmux_is_one_line_that_says_what_to_install(path, tmp_path):
    for name in ("sh", "dirname", "sed", "tr"):
        (tmp_path / name).symlink_to(shutil.which(name))
    copy = tmp_path / "scripts" / path.name
    copy.parent.mkdir()
    shutil.copy(path, copy)
    shutil.copy(ROOT / "scripts" / "common.sh", copy.parent)
    result = script(path.name, root=tmp_path, PATH=str(tmp_path), PYTHON="")
    assert (result.returncode, result.stderr.count("\n")) == (
        2,
        1,
    ) and "apt install" in result.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing():
    result = subprocess.run(
        ["shellcheck", *SCRIPTS, ROOT / "scripts" / "common.sh", ROOT / ".ci" / "run"],
        capture_output=True,
        text=True,
    )
    assert result.stdout == ""


def test_make_alone_lists_every_target():
    listed = subprocess.run(["make", "-C", ROOT], capture_output=True, text=True, check=True).stdout
    for target in "train resume tmux attach nohup stop test lint install clean".split():
        assert re.search(rf"^make {target} +\S", listed, re.MULTILINE)


@pytest.mark.parametrize(
    "way", [pytest.param("q", marks=pytest.mark.campaign), "Ctrl-C", "make stop"]
)
def test_a_run_that_has_saved_and_left_is_no_error_to_make(spawn, tmp_path, options, way):
    make = ["make", "-C", str(ROOT), f"VENV_PYTHON={sys.executable}", "-o", ".venv/installed"]
    child = spawn(
        command=[*make, "train", f"ARGS={shlex.join([*options, *ENDLESS])}"], env=ENVIRONMENT
    )
    child.expect("step [0-9]+/")
    if way == "q":
        child.sendline("q")
    elif way == "Ctrl-C":
        child.sendintr()
    else:
        where = f"ARGS=--checkpoint-dir '{tmp_path}/ck'"
        assert (
            "Emergency checkpoint: "
            in subprocess.run([*make, "stop", where], capture_output=True, text=True).stdout
        )
    said = finish(child)
    assert "Resume with" in said and "make: ***" not in said
    # By the rules make itself ends with Ctrl-C, so that what follows it in a script is not begun.
    assert (child.exitstatus, child.signalstatus) == ((None, 2) if way == "Ctrl-C" else (0, None))


def test_a_mistake_is_an_error_to_make():
    make = ["make", "-C", str(ROOT), f"VENV_PYTHON={sys.executable}", "-o", ".venv/installed"]
    assert (
        "Error 2"
        in subprocess.run(
            [*make, "train", "ARGS=--stpes 3"],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        ).stderr
    )


@pytest.mark.parametrize("number", ["0", "x", "2x", "", "-0"])
def test_torchrun_is_not_started_with_a_number_of_processes_that_is_none(number):
    result = subprocess.run(
        [str(ROOT / "scripts" / "train_torchrun.sh"), number],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": "false"},
    )
    if number.startswith("-"):  # an option of the program
        assert result.returncode == 1
    else:
        assert (
            result.returncode == 2
            and result.stderr
            == f"'{number}' is no number of processes: a number from 1 on, or auto\n"
        )


@pytest.mark.skipif(
    os.getuid() != 0 or not shutil.which("unshare") or not shutil.which("nsenter"),
    reason="needs root, unshare and nsenter",
)
def test_a_run_that_is_pid_1_of_a_container_is_stopped_from_inside(options, tmp_path):
    """What docker exec CONTAINER scripts/stop.sh does: nothing in the container outlives its pid 1."""
    with open(tmp_path / "out", "w") as out:
        container = subprocess.Popen(
            [
                "unshare",
                "-pf",
                "--mount-proc",
                sys.executable,
                str(SCRIPT),
                *map(str, [*options, *ENDLESS]),
                "--no-keyboard",
            ],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    wait_until(lambda: "step " in (tmp_path / "out").read_text(), container)
    inside = subprocess.run(
        ["pgrep", "-P", str(container.pid)], capture_output=True, text=True
    ).stdout.strip()
    asked = subprocess.run(
        [
            "nsenter",
            "-t",
            inside,
            "-p",
            "-m",
            str(ROOT / "scripts" / "stop.sh"),
            str(tmp_path / "ck"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert asked.returncode == 0 and "Asked pid 1 to save and leave" in asked.stderr, asked
    assert container.wait(60) == 143
    assert len(list((tmp_path / "ck" / "emergency_exit").glob("*.pt"))) == 1
