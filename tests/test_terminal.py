"""Terminal and process rules: background jobs, fg, end of input, vanished terminals, changed settings."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading

import pytest
from helpers import (
    ENDLESS,
    ROOT,
    SCRIPT,
    Forked,
    finish,
    processes_in_session,
    run,
    saved_path,
    wait_until,
)

import train_graceful as t
from train_graceful import load_checkpoint


def test_settings_changed_during_the_run_are_put_back(spawn, options):
    child = spawn(*options, *ENDLESS)
    child.expect("step [0-9]+/")
    before = termios.tcgetattr(child.child_fd)
    changed = termios.tcgetattr(child.child_fd)
    changed[3] &= ~termios.ECHO
    changed[0] &= ~termios.IXON
    termios.tcsetattr(child.child_fd, termios.TCSANOW, changed)
    child.sendline("q")
    finish(child)
    assert child.exitstatus == 0
    assert before != changed and termios.tcgetattr(child.child_fd) == before


@pytest.fixture
def shell(spawn):
    shell = spawn(
        command=["bash", "--norc", "-i"], env={**os.environ, "PS1": "READY> ", "TERM": "dumb"}
    )
    shell.expect("READY> ")
    return shell


def test_a_background_job_trains_on_while_the_shell_is_typed_at_and_hears_q_after_fg(
    shell, options, tmp_path
):
    metrics = tmp_path / "ck" / "metrics.csv"
    shell.sendline(" ".join([sys.executable, str(SCRIPT), *options, *ENDLESS, "&"]))
    wait_until(lambda: metrics.exists() and metrics.stat().st_size > 200)
    for line in ("echo typed-$((20 + 1))", "q() { echo shell-got-q; }; q"):
        shell.sendline(line)
        shell.expect("typed-21" if "typed" in line else "shell-got-q")
    size = metrics.stat().st_size
    wait_until(lambda: metrics.stat().st_size > size)  # not stopped by SIGTTIN or SIGTTOU
    shell.sendline("jobs")
    shell.expect("Running")
    shell.sendline("fg")
    shell.expect("step [0-9]+/")
    shell.sendline("q")
    shell.expect("Exit requested!")
    shell.expect("checkpoint saved: (.*pt)")
    load_checkpoint(saved_path(shell.after))
    shell.expect("READY> ")
    shell.sendline("echo code $?; stty -a")
    shell.expect("code 0")
    shell.expect(" icanon")
    assert "-icanon" not in shell.before


def test_ctrl_z_and_fg_in_the_middle_of_training(shell, options, tmp_path):
    shell.sendline(" ".join([sys.executable, str(SCRIPT), *options, *ENDLESS]))
    shell.expect("step [0-9]+/")
    shell.send("\x1a")
    shell.expect("Stopped")
    shell.sendline("fg")
    shell.expect("step [0-9]+/")
    shell.sendline("q")
    shell.expect("checkpoint saved: (.*pt)")
    shell.expect("READY> ")


SAVES_SLOWLY = """
import os, sys, train_graceful as t
go = sys.argv[1] + ".go"
def slow(*arguments, save=t.save_checkpoint):
    t.Screen().say("@saving")
    while not os.path.exists(go):
        pass
    save(*arguments)
t.save_checkpoint = slow
del sys.argv[1]
t.main(t.train, **t.OPTIONS)
"""


def test_ctrl_z_and_fg_in_the_middle_of_a_save(shell, options, tmp_path):
    (tmp_path / "slow.py").write_text(SAVES_SLOWLY)
    shell.sendline(
        " ".join(
            [
                f"PYTHONPATH={ROOT}",
                sys.executable,
                str(tmp_path / "slow.py"),
                str(tmp_path / "ck"),
                *options,
                *ENDLESS,
            ]
        )
    )
    shell.expect("step [0-9]+/")
    shell.sendline("q")
    shell.expect("@saving")
    shell.send("\x1a")
    shell.expect("Stopped")
    shell.expect("READY> ")
    shell.sendline("fg")
    (tmp_path / "ck.go").touch()
    shell.expect("checkpoint saved: (.*pt)")
    load_checkpoint(saved_path(shell.after))
    shell.expect("READY> ")
    shell.sendline("echo code $?")
    shell.expect("code 0")


@pytest.mark.parametrize("stdin", ["/dev/null", "closed", "empty pipe", "file"])
def test_end_of_input_ends_keyboard_monitoring_only(options, tmp_path, stdin):
    junk = tmp_path / "junk"
    junk.write_text("xq\nquery\nq")  # its last line has no end
    if stdin == "closed":
        command = [
            "sh",
            "-c",
            '"$@" <&-',
            "sh",
            sys.executable,
            str(SCRIPT),
            *options,
            "--steps",
            "30",
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    else:
        with open(junk) as file:
            result = run(
                *options,
                "--steps",
                "30",
                stdin={
                    "/dev/null": subprocess.DEVNULL,
                    "empty pipe": subprocess.PIPE,
                    "file": file,
                }[stdin],
            )
    assert result.returncode == 0 and result.stderr == ""
    assert load_checkpoint(saved_path(result.stdout))["exit_reason"] == "completed"


def test_q_through_a_pipe_leaves(options):
    process = Forked(
        [sys.executable, str(SCRIPT), *options, *ENDLESS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.stdin.write("x" * 100_000 + "q\n" + " q")
    process.stdin.flush()
    process.stdin.write(" \r\n")
    process.stdin.flush()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert load_checkpoint(saved_path(output))["exit_reason"] == "user_requested_graceful_exit"


def test_ctrl_d_in_a_line_does_not_glue_it_to_the_next(spawn, options):
    child = spawn(*options, *ENDLESS)
    child.expect("step [0-9]+/")
    child.send("x\4")
    child.send("\4")
    child.expect("step [0-9]+/")
    child.sendline("q")
    child.expect("Exit requested!")
    finish(child)
    assert child.exitstatus == 0


def test_endless_input_does_not_hold_up_training(options):
    with open("/dev/zero") as zeros:
        assert run(*options, "--steps", "20", stdin=zeros).returncode == 0


def test_no_keyboard_leaves_typed_lines_to_others(spawn, options):
    child = spawn(*options, "--steps", "200", "--no-keyboard")
    child.expect("step [0-9]+/")
    child.sendline("q")
    output = finish(child)
    assert child.exitstatus == 0 and "Exit requested" not in output and "All steps done" in output


def test_a_closed_terminal_leaves_a_whole_checkpoint(options, tmp_path):
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(
            sys.executable, [sys.executable, str(SCRIPT), *options, *ENDLESS, "--workers", "2"]
        )
    output = b""
    while b"step " not in output:
        output += os.read(terminal, 1024)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    checkpoint = load_checkpoint(next((tmp_path / "ck" / "emergency_exit").glob("*.pt")))
    assert checkpoint["exit_reason"] == "signal_SIGHUP"
    assert processes_in_session(pid) == []


def test_a_terminal_that_hangs_up_is_no_end_under_nohup(options, tmp_path):
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)  # nohup.out goes there
        os.execvp("nohup", ["nohup", sys.executable, str(SCRIPT), *options, "--steps", "200"])
    metrics = tmp_path / "ck" / "metrics.csv"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size > 200)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert load_checkpoint(tmp_path / "ck" / "final.pt")["exit_reason"] == "completed"


def test_the_status_line_is_redrawn_in_place_and_never_wider_than_the_terminal(spawn, options):
    child = spawn(*options, "--steps", "300")
    child.expect("step [0-9]+/")
    child.setwinsize(24, 40)
    output = finish(child)
    assert child.exitstatus == 0
    drawn = [part for part in output.partition("Final")[0].split("\r") if "step " in part]
    assert len(drawn) > 3
    assert all(
        len(part) < 40 for part in drawn[len(drawn) // 2 :]
    )  # all that were drawn after the resize was seen
    assert output.count("\n") < 20


def test_a_plain_line_for_every_log_interval_where_there_is_no_terminal(options):
    result = run(*options, "--steps", "40", "--log-every", "10")
    steps = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("step")]
    assert steps == ["10/40", "20/40", "30/40", "40/40"]
    assert "\r" not in result.stdout


@pytest.mark.parametrize(
    "columns, expected",
    [
        (120, "step 5/10 | loss 2.1559 | 0:04:54 left"),
        (40, "step 5/10 | loss 2.1559 | 0:04:54 "),
        (20, "step 5/10 | lo"),
        (5, "s"),
    ],
)
def test_the_status_line_leaves_room_for_a_command(monkeypatch, columns, expected):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(theirs, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        screen = t.Screen()
        screen.status(lambda: "step 5/10 | loss 2.1559 | 0:04:54 left")
        drawn = os.read(ours, 1000).decode()
    os.close(ours)
    assert drawn == f"{expected} "
    # In the last column a terminal would wrap.
    assert columns < 20 or len(expected + " quit") < columns


def test_a_question_mark_shows_the_keys_and_the_last_checkpoint(spawn, fork, options, tmp_path):
    child = spawn(*options, *ENDLESS)
    child.expect("step [0-9]+/")
    child.sendline("?")
    child.expect("Keys: q . Enter saves and leaves.*No checkpoint yet[.]")
    child.sendline("s")
    child.expect("Checkpoint saved: .*step_([0-9]+).pt")
    child.sendline("?")
    child.expect(f"Last checkpoint: step_{child.match[1]}.pt, [0-9:]+ ago.")
    child.sendline("what?")
    child.expect("Keys: ")
    child.sendline("q")
    assert "Last checkpoint" not in finish(child) and child.exitstatus == 0
    child = fork("--resume", "latest", "--checkpoint-dir", tmp_path / "ck")
    child.terminal.expect("step [0-9]+/")
    child.terminal.send("?\n")
    child.terminal.expect("Last checkpoint: emergency_step_[0-9]+.pt, [0-9:]+ ago.")


def test_a_question_mark_does_not_make_the_monitor_deaf_whatever_lies_in_the_directory(
    spawn, options, tmp_path
):
    """A link to a checkpoint that is gone: where one is deleted at that moment it is the same."""
    child = spawn(*options, *ENDLESS)
    child.expect("step [0-9]+/")
    (tmp_path / "ck" / "gone.pt").symlink_to(tmp_path / "nowhere.pt")
    child.sendline("?")
    child.expect("Keys: ")
    child.sendline("q")
    child.expect("Exit requested!")
    finish(child)
    assert child.exitstatus == 0


def test_a_line_that_the_shell_reads_first_does_not_make_the_monitor_deaf(monkeypatch):
    """Around fg: select() has announced a line, and when the monitor comes to read it the shell has done so."""
    ours, theirs = pty.openpty()
    taken = threading.Event()

    def in_foreground(fd: int) -> bool:
        if not taken.is_set() and select.select([theirs], [], [], 0)[0]:
            assert os.read(theirs, 100) == b"fg\n"
            taken.set()
        return True

    monkeypatch.setattr(t, "in_foreground", in_foreground)
    with open(theirs) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with t.ExitMonitor(t.Screen(shown=False)) as monitor:
            os.write(ours, b"fg\n")
            assert taken.wait(10)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(lambda: monitor.exit_requested, timeout=10)
            assert monitor.reason == "signal_SIGTERM"
            os.write(ours, b"s\n")
            wait_until(lambda: monitor.save_requested, timeout=10)
    os.close(ours)
