"""Campaigns: a save that is killed at any system call, or whose writes fail, loses nothing."""

import collections
import errno
import itertools
import os
import re
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import helpers as h
import pytest
from driver import SCHEDULE, Campaign, comes_to_the_same_end, undisturbed

import train_graceful as t

MODES = ["standard", "geometric"]
# A save: its file, and the step of the last save that was complete before it.
SAVES = {
    "periodic": ("step_6.pt", 4),
    "best": ("best.pt", 4),
    "final": ("final.pt", 6),
    "emergency": ("emergency_step_5.pt", 4),
}
ERRORS = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS]
FAILING = ("openat", "write", "fsync", "rename", "close", "unlink")
needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None, reason="strace is missing: apt install strace"
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("small"), *SCHEDULE)


def small_pieces(frame) -> None:
    """So that the file of a model this small is written in many."""
    frame.f_globals["PIECE_BYTES"] = 512


def asks_as_q_does(frame) -> None:
    frame.f_locals["self"].monitor.request(t.USER_REQUEST, 0)


def at(save: str, ask=h.frame_asks_to_leave) -> list:
    """A plan: to wait where the save begins, and to look for /saved, for strace to show, behind."""
    plan = [(h.Moment("train"), small_pieces)]
    if save == "emergency":
        plan += [(h.Moment("complete", 5), ask)]

    def is_it(frame) -> bool:
        return Path(frame.f_locals["name"]).name == SAVES[save][0]

    begins = h.Moment("save", 2 if save == "best" else 1, where=is_it)
    ends = h.Moment("save", event="return")
    return [*plan, (begins, None), (ends, lambda frame: os.path.exists("/saved"))]


def traced(child: h.Child, log: Path, *options: str) -> subprocess.Popen:
    """A child that waits goes on, with strace on the thread that has waited."""
    command = ["strace", "-p", str(child.paused()), "-o", str(log), "-e", "trace=%file,%desc"]
    strace = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    assert "attached" in strace.stderr.readline()
    child.go()
    return strace


def calls_of(fork, options, directory: Path, save: str) -> list[str]:
    """What strace shows of a save."""
    log = directory.with_suffix(".trace")
    child = fork(*options, "--checkpoint-dir", directory, plan=at(save))
    strace = traced(child, log)
    child.finish()
    strace.communicate()
    shutil.rmtree(directory)
    # The first is the wait's own read.
    return log.read_text().partition("/saved")[0].splitlines()[1:-1]


def points_of(calls: list[str]) -> list[tuple[str, int]]:
    """Every system call in turn that changes something: (name, how many of that name so far)."""
    counts, points, other = collections.Counter(), [], None
    for call in calls:
        name = call.partition("(")[0]
        if name in ("lseek", "read", "pread64", "newfstatat", "fstat", "fadvise64"):
            continue
        counts[name] += 1
        if '"/sys/' in call:  # how many threads may run here: no part of the save
            other = f"close({call.rpartition('= ')[2]})"
        elif other and call.startswith(other):
            other = None
        else:
            points.append((name, counts[name]))
    assert ("rename", 1) in points
    return points


def some_of(points: list, turn: int) -> list:
    """In the short versions, every second kind of call for the first time."""
    return [(call, nth) for call, nth in points if nth == 1 and call in FAILING][turn % 2 :: 2]


@needs_strace
def test_the_order_of_a_save_survives_a_power_loss(fork, small, tmp_path):
    """What was not flushed may be lost or come late: the bytes, their name, the old one's end."""
    calls = calls_of(fork, small("standard")[0], tmp_path / "ck", "periodic")
    names = [call.partition("(")[0] for call in calls]
    names = [name for name in names if name in ("write", "fsync", "rename", "unlink")]
    order = [name for name, before in zip(names, [None, *names]) if name != before]
    # The rows of metrics.csv; the file; its name; an old one.
    assert order == ["fsync", "write", "fsync", "rename", "fsync", "unlink"]


def killed(fork, options, reference, directory, save: str, call: str, nth: int) -> None:
    child = fork(*options, "--checkpoint-dir", directory, plan=at(save))
    fault = f"inject={call}:signal=KILL:when={nth}"
    strace = traced(child, directory.with_suffix(".trace"), "-e", fault)
    h.ended(child, -signal.SIGKILL)
    strace.communicate()
    files = h.whole_files(directory)
    if save == "periodic":
        assert sum(name.startswith("step_") for name in files) >= 2
    output = comes_to_the_same_end(fork, directory, reference)
    step = int(re.search("(?:Resumed at|Nothing left to do:) step ([0-9]+)", output)[1])
    assert step == max(files.values()) >= SAVES[save][1]
    assert not list(directory.rglob(".*.tmp"))


@needs_strace
def test_killed_at_every_point_of_a_save(fork, small, tmp_path, whole):
    what = "SIGKILL at every system call of a save (emergency, periodic, best, final), then resumed"
    with Campaign(what) as campaign:
        for mode in MODES if whole else ["standard"]:
            options, reference = small(mode)
            for turn, save in enumerate(SAVES):
                points = points_of(calls_of(fork, options, tmp_path / "dry", save))
                for call, nth in points if whole else some_of(points, turn):
                    directory = tmp_path / f"{mode}-{save}-{call}-{nth}"
                    how = directory, save, call, nth
                    campaign.case(directory.name, killed, fork, options, reference, *how)
                    shutil.rmtree(directory)


def fails(fork, options, directory, save, check, error, needed, call, nth) -> None:
    """A system call of a save does, once or (for_good) from then on."""
    fallback = directory.with_name("tmp")
    fallback.mkdir(parents=True)
    ask, steps = (asks_as_q_does, 10**6) if check is after_q else (h.frame_asks_to_leave, 7)
    words = *options, "--steps", steps, "--checkpoint-dir", directory
    child = fork(*words, plan=at(save, ask), TMPDIR=str(fallback))
    fault = f"inject={call}:error={errno.errorcode[error]}:when={nth}"
    fault += "+" if check is for_good else ""
    traced(child, directory.with_suffix(".trace"), "-e", fault)
    check(fork, child, directory, fallback, save, os.strerror(error), needed)


def after_q(fork, child, directory, fallback, save, why, needed) -> None:
    """The run says so in one line and trains on; q again saves and leaves."""
    failed = f"❌ Emergency checkpoint not saved: {why}. Training goes on: make room.*\n"
    if child.terminal.expect([failed, "✅ Emergency checkpoint saved"]) == 0:
        child.terminal.expect("step [0-9]+/")
        child.terminal.send("q\n")
    else:
        assert not needed
    assert "Graceful exit completed" in h.ended(child)
    assert list(fallback.iterdir()) == []


def after_a_signal(fork, child, directory, fallback, save, why, needed) -> None:
    """The temporary directory is used and named, and the run goes on from there."""
    output = h.ended(child, 143)
    saved = re.search(r"✅ Emergency checkpoint saved: (\S+)", output)[1]
    assert t.load_checkpoint(saved)["exit_reason"] == "signal_SIGTERM"
    if "Trying the temporary directory" in output:
        assert f"❌ Emergency checkpoint not saved: {why}" in output
        assert saved.startswith(f"{fallback}/train_graceful_")
        assert f"   Emergency checkpoint: {saved}\r" in output
    output = h.ended(fork("--resume", saved, TMPDIR=str(fallback)))
    assert "Resumed at step 5 of 7" in output and f"saves in {directory}\r" in output


def for_good(fork, child, directory, fallback, save, why, needed) -> None:
    """Exit code 1, and the earlier checkpoints are whole."""
    output = h.ended(child, 1)
    assert "Graceful exit completed" not in output
    assert f"Newest whole checkpoint: {directory}/step_4.pt" in output
    assert "step_4.pt" in h.whole_files(directory)


def in_between(fork, child, directory, fallback, save, why, needed) -> None:
    """A periodic or best save that fails is reported; the run ends as if nothing had been."""
    output, files, name = h.ended(child), h.whole_files(directory), SAVES[save][0]
    if f"⚠️ {name} not saved: {why}. Training goes on." in output:
        # Two are kept; the last one may be there, though its name could not be flushed.
        other = "step_6.pt" if "step_6.pt" in files else "step_2.pt"
        assert save != "periodic" or {other, "step_4.pt"} <= set(files)
    else:
        # A file that cannot be read is evaded like another run's.
        assert name in files and (not needed or "best_2.pt" in files)
    assert files["final.pt"] == 7 and not list(directory.rglob(".*.tmp"))


FAILURES = [
    ("emergency", after_q),
    ("emergency", after_a_signal),
    ("emergency", for_good),
    ("periodic", in_between),
    ("best", in_between),
]


@needs_strace
def test_every_write_of_a_save_fails(fork, small, tmp_path, whole):
    what = "ENOSPC, EIO, EDQUOT, EROFS at every open, write, fsync, rename, close, unlink of a save"
    with Campaign(what) as campaign:
        for mode in MODES if whole else ["standard"]:
            options, _ = small(mode)
            for turn, (save, check) in enumerate(FAILURES):
                points = points_of(calls_of(fork, options, tmp_path / "dry", save))
                # What comes behind, when old ones go, and what is said, may fail.
                count = sum(call == "fsync" for call, _ in points)
                needed = points[: points.index(("fsync", count)) + 1]
                # One piece is like the next; the last may not come, for a path is in the file.
                pieces = [nth for call, nth in points if call == "write"][:-8:8]
                points = [(call, nth) for call, nth in points if call != "write" or nth in pieces]
                points = [point for point in points if point[0] in FAILING]
                if check is for_good:
                    points = [("fsync", 1), ("fsync", 2), ("rename", 1)]
                errors = ERRORS if whole else [ERRORS[turn % 4]]
                for error, point in itertools.product(errors, points):
                    if whole or point in some_of(points, turn):
                        folder = tmp_path / f"{mode}-{turn}-{error}-{'-'.join(map(str, point))}"
                        is_needed = point in needed and point[0] != "write"
                        how = folder / "ck", save, check, error, is_needed, *point
                        campaign.case(folder.name, fails, fork, options, *how)
                        shutil.rmtree(folder)


def test_q_on_a_full_disk_trains_on_until_there_is_room(fork, small, tmp_path):
    """A limit on the size of files is like one. Rows of metrics.csv that do not fit wait, too."""
    child = fork(*small("geometric")[0], *h.ENDLESS, "--checkpoint-dir", tmp_path)
    child.terminal.expect("step [0-9]+/")
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    for _ in range(2):
        child.terminal.send("q\n")
        child.terminal.expect("❌ Emergency checkpoint not saved: File too large. Training goes on")
        child.terminal.expect("step [0-9]+/")
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    child.terminal.send("q\n")
    assert "Graceful exit completed" in h.ended(child)
    assert len(h.whole_files(tmp_path)) == 1
    steps = [int(row["step"]) for row in h.metrics_without_times(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
