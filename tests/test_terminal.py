"""Keyboard, terminal and screen: what is typed is heard and shown, and the terminal given back."""

import os
import pty
import select
import signal
import subprocess
import sys
import termios
from pathlib import Path

import helpers as h
import pytest

import train_graceful as t


@pytest.fixture
def training(spawn, options):
    """A run on a terminal, in training until it is asked to leave."""
    child = spawn(*options, *h.ENDLESS)
    child.expect("step [0-9]+/")
    return child


def leaves(child) -> str:
    """After q; what it has printed since."""
    child.sendline("q")
    child.expect("Exit requested!")
    output = h.finish(child)
    assert child.exitstatus == 0
    return output


# ---- keyboard


def test_every_spelling_of_q_is_heard_and_a_failed_save_goes_on_training(training, tmp_path):
    blocker = tmp_path / "ck" / "emergency_exit"
    blocker.write_text("a file where the directory should be")
    # The last comes behind an end of input in the middle of a line.
    for line in ("Q", "  q ", "quit", "EXIT", "qu\4it", "x\4\4q"):
        training.sendline(line)
        training.expect("Exit requested!")
        training.expect("Emergency checkpoint not saved: .* Training goes on")
        training.expect("step [0-9]+/")
    blocker.unlink()
    t.load_checkpoint(h.saved_path(leaves(training)))


def test_s_saves_and_other_lines_show_the_keys_and_the_last_checkpoint(training, tmp_path):
    for line in ("xq", "query", "q q", "?", "", "é\x00q"):
        training.sendline(line)
        training.expect("Keys: q \\+ Enter saves and leaves")
        training.expect("No checkpoint yet[.]" if line == "?" else "")
        training.expect("step [0-9]+/")
        assert "Exit requested" not in training.before
    training.sendline("s")
    training.expect("Checkpoint saved: (\\S+)\r")
    path = Path(training.match[1])
    state = t.load_checkpoint(path)
    assert path == tmp_path / "ck" / f"step_{state['step']}.pt"
    assert state["exit_reason"] == "user_requested_save"
    training.sendline("?")
    training.expect(f"Last checkpoint: {path.name}, [0-9:]+ ago.")
    leaves(training)


@pytest.mark.parametrize("stdin", ["<&-", "<junk"])
def test_the_end_of_input_ends_no_training_and_without_a_terminal_lines_are_plain(
    options, tmp_path, stdin
):
    (tmp_path / "junk").write_text("xq\nquery\nq")  # its last line has no end
    command = ["sh", "-c", f'"$@" {stdin}', "sh", sys.executable, str(h.SCRIPT), *options]
    command += ["--steps", "30", "--log-every", "10"]
    how = {"capture_output": True, "text": True, "timeout": 60}
    result = subprocess.run(command, cwd=tmp_path, **how)
    assert result.returncode == 0 and result.stderr == ""
    assert t.load_checkpoint(h.saved_path(result.stdout))["exit_reason"] == "completed"
    steps = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("step")]
    assert steps == ["10/30", "20/30", "30/30"] and "\r" not in result.stdout


def test_q_through_a_pipe_leaves(options):
    command = [sys.executable, str(h.SCRIPT), *options, *h.ENDLESS]
    process = h.forked(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    next(line for line in process.stdout if line.startswith("step"))
    for text in ("x" * 100_000 + "q\n" + " q", " \r\n"):
        process.stdin.write(text)
        process.stdin.flush()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert t.load_checkpoint(h.saved_path(output))["exit_reason"] == "user_requested_graceful_exit"


def test_no_keyboard_leaves_typed_lines_to_others(spawn, options):
    child = spawn(*options, "--steps", "200", "--no-keyboard")
    child.expect("step [0-9]+/")
    child.sendline("q")
    output = h.finish(child)
    assert child.exitstatus == 0 and "Exit requested" not in output and "All steps done" in output


def test_a_line_that_the_shell_reads_first_does_not_make_the_monitor_deaf(monkeypatch):
    """Around fg: select() has announced a line, but when it is to be read the shell has done so."""
    ours, theirs = pty.openpty()
    taken = []

    def in_foreground(fd: int) -> bool:
        if select.select([theirs], [], [], 0)[0]:
            taken.append(os.read(theirs, 100))
        return True

    monkeypatch.setattr(t, "in_foreground", in_foreground)
    with open(theirs) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with t.ExitMonitor(t.Screen(shown=False)) as monitor:
            os.write(ours, b"fg\n")
            h.wait_until(lambda: taken)
            os.kill(os.getpid(), signal.SIGTERM)
            h.wait_until(lambda: monitor.exit_requested, timeout=10)
    os.close(ours)


# ---- terminal

SAVES_SLOWLY = f"""
import os, sys
sys.path.insert(0, {str(h.ROOT)!r})
import train_graceful as t
def slow(*arguments, save=t.save_checkpoint):
    print("@saving", flush=True)
    while not os.path.exists(GO):
        pass
    save(*arguments)
t.save_checkpoint = slow
t.main(t.train, **t.OPTIONS)
"""


def test_a_job_of_a_shell_trains_in_the_background_and_hears_q_after_fg(spawn, options, tmp_path):
    """Ctrl-Z and fg do no harm either; no q reaches the shell."""
    go, metrics = tmp_path / "go", tmp_path / "ck" / "metrics.csv"
    (tmp_path / "slow.py").write_text(SAVES_SLOWLY.replace("GO", repr(str(go))))
    environment = {**os.environ, "PS1": "READY> ", "TERM": "dumb"}
    shell = spawn(command=["bash", "--norc", "--noediting", "-i"], env=environment)

    def foreground() -> None:
        shell.sendline("fg")
        h.wait_until(lambda: os.tcgetpgrp(shell.child_fd) != shell.pid)
        shell.expect("step [0-9]+/")

    shell.expect("READY> ")
    words = [sys.executable, tmp_path / "slow.py", *options, *h.ENDLESS, "&"]
    shell.sendline(" ".join(map(str, words)))
    h.wait_until(lambda: metrics.exists() and metrics.stat().st_size > 200)
    shell.sendline("q() { echo got-$1; }; q q")
    shell.expect("got-q")
    assert "step " not in shell.before, "a status line is for the foreground"
    size = metrics.stat().st_size
    # Not stopped by SIGTTIN or SIGTTOU.
    h.wait_until(lambda: metrics.stat().st_size > size)
    foreground()
    shell.send("\x1a")
    shell.expect("Stopped")
    shell.expect("READY> ")
    foreground()
    shell.sendline("q")
    shell.expect("@saving")
    shell.send("q\nq\nq")
    go.touch()
    shell.expect("checkpoint saved: .*pt")
    t.load_checkpoint(h.saved_path(shell.after))
    shell.expect("READY> ")
    shell.sendline("echo code $?")
    shell.expect("code 0")
    assert "got-" not in shell.before


def test_settings_changed_during_the_run_are_put_back(training):
    before = termios.tcgetattr(training.child_fd)
    changed = termios.tcgetattr(training.child_fd)
    changed[3] &= ~termios.ECHO
    termios.tcsetattr(training.child_fd, termios.TCSANOW, changed)
    leaves(training)
    assert termios.tcgetattr(training.child_fd) == before


# ---- screen


def test_the_status_line_is_redrawn_in_place_and_never_wider_than_the_terminal(spawn, options):
    child = spawn(*options, "--steps", "300")
    child.expect("step [0-9]+/")
    child.setwinsize(24, 40)
    output = h.finish(child)
    assert child.exitstatus == 0 and output.count("\n") < 20
    drawn = [part for part in output.partition("Final")[0].split("\r") if "step " in part]
    assert len(drawn) > 3
    # After the resize was seen; columns stay free for a command.
    assert max(map(len, drawn[len(drawn) // 2 :])) == 40 - 5
