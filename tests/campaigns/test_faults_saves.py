"""Campaigns: a run killed at every system call of a save, and one whose every write fails."""

import collections
import errno
import os
import re
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from driver import SCHEDULE, SMALL, Campaign, needs_strace, trace
from helpers import (
    Child,
    Moment,
    assert_same_run,
    batch_complete,
    frame_asks_to_leave,
    metrics_without_times,
    whole_files,
)

import train_graceful as t

MODES = ["standard", "geometric"]
SAVES = {
    "periodic": ("step_6.pt", 1),
    "best": ("best.pt", 2),
    "final": ("final.pt", 1),
    "emergency": ("emergency_step_5.pt", 1),
}
PROMISED = {
    "periodic": 4,
    "best": 4,
    "final": 6,
    "emergency": 4,
}  # the step of the last save that was complete before


def at(save: str) -> list:
    """The plan of a child that waits at the beginning of a save, and looks for /saved, for strace to show, at its end."""
    name, nth = SAVES[save]
    leave = [(batch_complete(5), frame_asks_to_leave)] if save == "emergency" else []
    return leave + [
        (Moment("_save", nth, where=lambda frame: Path(frame.f_locals["name"]).name == name), None),
        (Moment("_save", event="return"), lambda frame: os.path.exists("/saved")),
    ]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(options, directory of the uninterrupted run) by mode."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "corpus.txt").write_bytes(
        b"".join(b"%d squared is %d; " % (n, n * n) for n in range(300))
    )
    made = {}
    for mode in MODES:
        made[mode] = (
            ["--data", folder / "corpus.txt", *SMALL, *SCHEDULE, "--mode", mode],
            folder / mode,
        )
        child = Child(*made[mode][0], "--checkpoint-dir", folder / mode)
        child.finish()
        assert child.exitcode == 0
    return made


def system_calls(fork, options, directory, save: str) -> list[tuple[str, int]]:
    """Every system call of a save in turn: (name, how many of that name so far)."""
    child = fork(*options, "--checkpoint-dir", directory, plan=at(save))
    strace = trace(child.paused(), directory / "trace")
    child.go()
    child.finish()
    strace.communicate()
    calls = (
        (directory / "trace").read_text().partition("/saved")[0].splitlines()[1:-1]
    )  # the first is the wait's own read
    assert any("rename" in call for call in calls)
    counts: collections.Counter = collections.Counter()
    points, other = [], None
    calls = [
        call
        for call in calls
        if not call.startswith(("lseek", "read", "pread64", "newfstatat", "fstat"))
    ]  # these change nothing
    for call in calls:
        name = call.partition("(")[0]
        counts[name] += 1
        if '"/sys/' in call:  # how many threads may run here: no part of the save
            other = f"close({call.rpartition('= ')[2]})"
        elif other and call.startswith(other):
            other = None
        else:
            points.append((name, counts[name]))
    return points


def test_the_order_of_a_save_survives_a_power_loss(fork, small, tmp_path):
    """What was not flushed may be lost or come late: the file's bytes, then its name, then the deletion of an old one."""
    options, _ = small["standard"]
    (tmp_path / "ck").mkdir()
    system_calls(fork, options, tmp_path / "ck", "periodic")
    lines = (tmp_path / "ck" / "trace").read_text().partition("/saved")[0].splitlines()
    calls = [
        re.sub(r"\(.*", "", line) for line in lines if re.match("write|fsync|rename|unlink", line)
    ]
    order = [call for call, before in zip(calls, [None, *calls]) if call != before]
    # The rows of metrics.csv; the file; its name; an old one.
    assert order == ["fsync", "write", "fsync", "rename", "fsync", "unlink"]


def assert_resumes_to_the_same_end(fork, directory, reference, promised: int) -> None:
    files = whole_files(directory)
    child = fork("--resume", "latest", "--checkpoint-dir", directory)
    output = child.finish()
    assert child.exitcode == 0, output
    assert (
        int(re.search("(?:Resumed at|Nothing left to do:) step ([0-9]+)", output)[1])
        == max(files.values())
        >= promised
    )
    assert not list(directory.rglob(".*.tmp"))
    assert_same_run(directory, reference)


def killed(fork, options, reference, directory, save: str, call: str, nth: int) -> None:
    child = fork(*options, "--checkpoint-dir", directory, plan=at(save))
    strace = trace(
        child.paused(),
        directory.with_suffix(".trace"),
        "-e",
        f"inject={call}:signal=KILL:when={nth}",
    )
    child.go()
    child.finish()
    strace.communicate()
    assert child.exitcode == -signal.SIGKILL
    if save == "periodic":
        assert sum(name.startswith("step_") for name in whole_files(directory)) >= 2
    assert_resumes_to_the_same_end(fork, directory, reference, PROMISED[save])


@needs_strace
def test_killed_at_every_point_of_a_save(fork, small, tmp_path, whole):
    with Campaign(
        "SIGKILL at every system call of a save (emergency, periodic, best, final), then resumed"
    ) as campaign:
        for mode in MODES if whole else ["standard"]:
            options, reference = small[mode]
            for turn, save in enumerate(SAVES):
                (tmp_path / "dry").mkdir()
                points = system_calls(fork, options, tmp_path / "dry", save)
                shutil.rmtree(tmp_path / "dry")
                if not whole:  # each kind of call, the first time and the last, in turn
                    points = [
                        point
                        for point in points
                        if point[1] == 1 or (point[0], point[1] + 1) not in points
                    ]
                    points = [
                        point
                        for point in points
                        if point[0] in ("openat", "write", "fsync", "rename", "unlink")
                    ][turn % 2 :: 2]
                for call, nth in points:
                    directory = tmp_path / f"{mode}-{save}-{call}-{nth}"
                    campaign.case(
                        directory.name, killed, fork, options, reference, directory, save, call, nth
                    )
                    shutil.rmtree(directory)


def small_pieces(frame) -> None:
    """So that a model this small has many."""
    frame.f_globals["PIECE_BYTES"] = 512


def test_killed_at_every_piece(fork, small, tmp_path, whole):
    with Campaign("SIGKILL at every piece that a save writes, then resumed") as campaign:
        options, reference = small["geometric"]
        for save in SAVES if whole else ["periodic"]:
            before_it = at(save)[:-1]
            for nth in range(1, 60, 1 if whole else 19):

                def killed_at_a_piece() -> None:
                    kill = (
                        Moment("write", nth),
                        lambda frame: os.kill(os.getpid(), signal.SIGKILL),
                    )
                    child = fork(
                        *options,
                        "--checkpoint-dir",
                        directory,
                        plan=[(Moment("train"), small_pieces), *before_it, kill],
                    )
                    child.paused()
                    child.go()
                    child.finish()
                    assert child.exitcode == -signal.SIGKILL
                    assert_resumes_to_the_same_end(fork, directory, reference, PROMISED[save])

                directory = tmp_path / f"{save}-{nth}"
                campaign.case(directory.name, killed_at_a_piece)
                shutil.rmtree(directory)


ERRORS = ["ENOSPC", "EIO", "EDQUOT", "EROFS"]
FAILING = ("openat", "write", "pwrite64", "fsync", "ftruncate", "rename", "close", "unlink")


def failing(child, log, error: str, call: str, when: str) -> subprocess.Popen:
    """Lets a child that waits at a save go on, with a system call that fails."""
    strace = trace(child.paused(), log, "-e", f"inject={call}:error={error}:when={when}")
    child.go()
    return strace


def report_of(error: str) -> str:
    return re.escape(os.strerror(getattr(errno, error)))


def fails_after_q(fork, options, directory, fallback, error: str, call: str, nth: int) -> None:
    """The run says so in one line and trains on; q again saves and leaves."""
    # It may be heard a moment after it has been acknowledged: after this batch, or the next.
    begins = Moment(
        "_save", where=lambda frame: frame.f_locals["name"].startswith("emergency_exit/")
    )
    waits = [(batch_complete(5), None), (begins, None)]
    child = fork(
        *options, "--steps", 10**6, "--checkpoint-dir", directory, plan=waits, TMPDIR=str(fallback)
    )
    child.paused()
    child.terminal.send("q\n")
    child.terminal.expect("Exit requested!")
    child.go()
    failing(child, directory.with_suffix(".trace"), error, call, str(nth))
    found = child.terminal.expect(
        [
            f"❌ Emergency checkpoint not saved: {report_of(error)}. Training goes on: make room.*\n",
            "✅ Emergency checkpoint saved",
        ]
    )
    if found == 0:
        child.terminal.expect("step [0-9]+/")
        child.terminal.send("q\n")
    else:
        assert call in ("pwrite64", "ftruncate", "write"), "a fault that a save may take"
    output = child.finish()
    assert child.exitcode == 0 and "Graceful exit completed" in output
    assert list(fallback.iterdir()) == []


def fails_after_a_signal(
    fork, options, directory, fallback, error: str, call: str, nth: int
) -> None:
    """The temporary directory is used and named, and the run goes on from there."""
    child = fork(
        *options, "--checkpoint-dir", directory, plan=at("emergency"), TMPDIR=str(fallback)
    )
    failing(child, directory.with_suffix(".trace"), error, call, str(nth))
    output = child.finish()
    saved = re.search(r"✅ Emergency checkpoint saved: (\S+)", output)[1]
    assert child.exitcode == 143 and t.load_checkpoint(saved)["step"] == 5
    if "Trying the temporary directory" in output:
        assert f"❌ Emergency checkpoint not saved: {os.strerror(getattr(errno, error))}" in output
        assert saved.startswith(str(fallback))
    child = fork("--resume", saved, TMPDIR=str(fallback))
    output = child.finish()
    assert child.exitcode == 0 and "Resumed at step 5 of 7" in output
    assert f"saves in {directory}\r" in output


def fails_for_good_after_a_signal(
    fork, options, directory, fallback, error: str, call: str, nth: int
) -> None:
    """Everything fails from there on: exit code 1, the earlier checkpoints are whole."""
    child = fork(
        *options, "--checkpoint-dir", directory, plan=at("emergency"), TMPDIR=str(fallback)
    )
    failing(child, directory.with_suffix(".trace"), error, call, f"{nth}+")
    child.finish()
    assert child.exitcode == 1
    assert "step_4.pt" in whole_files(directory)


def fails_in_between(
    fork, options, directory, fallback, error: str, call: str, nth: int, save: str
) -> None:
    """A periodic or best save that fails is reported; the run ends as if nothing had been."""
    child = fork(*options, "--checkpoint-dir", directory, plan=at(save)[:1], TMPDIR=str(fallback))
    failing(child, directory.with_suffix(".trace"), error, call, str(nth))
    output = child.finish()
    assert child.exitcode == 0, output
    files = whole_files(directory)
    if (
        f"⚠️ {SAVES[save][0]} not saved: {os.strerror(getattr(errno, error))}. Training goes on."
        in output
    ):
        assert save != "periodic" or {"step_2.pt", "step_4.pt"} <= set(files)
    else:
        assert SAVES[save][0] in files and call in ("pwrite64", "ftruncate", "write", "unlink")
    assert files["final.pt"] == 7 and not list(directory.rglob(".*.tmp"))


@needs_strace
def test_every_write_of_a_save_fails(fork, small, tmp_path, whole):
    with Campaign(
        "ENOSPC, EIO, EDQUOT, EROFS at every open, write, fsync, rename, close, unlink of a save"
    ) as campaign:
        for mode in MODES if whole else ["standard"]:
            options, _ = small[mode]
            for turn, (save, check) in enumerate(
                [
                    ("emergency", fails_after_q),
                    ("emergency", fails_after_a_signal),
                    ("emergency", fails_for_good_after_a_signal),
                    ("periodic", lambda *args: fails_in_between(*args, "periodic")),
                    ("best", lambda *args: fails_in_between(*args, "best")),
                ]
            ):
                (tmp_path / "dry").mkdir()
                points = [
                    point
                    for point in system_calls(fork, options, tmp_path / "dry", save)
                    if point[0] in FAILING
                ]
                points = [
                    (call, nth) for call, nth in points if call != "pwrite64" or nth % 20 == 1
                ]  # one part is like the next
                shutil.rmtree(tmp_path / "dry")
                if check is fails_for_good_after_a_signal:
                    points = [("fsync", 1), ("fsync", 2), ("rename", 1), ("openat", 1)]
                cases = [(error, *point) for error in ERRORS for point in points]
                if not whole:  # every second kind of call, the errors in turn
                    cases = [
                        (ERRORS[i % 4], call, nth)
                        for i, (call, nth) in enumerate(points)
                        if nth == 1
                    ][turn % 2 :: 2]
                for error, call, nth in cases:
                    directory, fallback = (
                        tmp_path / f"{mode}-{save}-{check.__name__}-{error}-{call}-{nth}",
                        tmp_path / "fallback",
                    )
                    fallback.mkdir()
                    campaign.case(
                        directory.name, check, fork, options, directory, fallback, error, call, nth
                    )
                    shutil.rmtree(directory)
                    shutil.rmtree(fallback)


@pytest.mark.parametrize("how", ["small file system", "limit on the size of files"])
def test_q_on_a_full_disk_trains_on_until_there_is_room(fork, small, tmp_path, how):
    directory = tmp_path / "ck"
    directory.mkdir()
    if (
        how == "small file system"
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", directory], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a file system is not permitted here")
    try:
        child = fork(
            *small["geometric"][0],
            "--steps",
            10**6,
            "--save-every",
            10**6,
            "--eval-every",
            10**6,
            "--checkpoint-dir",
            directory,
        )
        child.terminal.expect("step [0-9]+/")
        if how == "small file system":
            with open(directory / "filler", "wb", buffering=0) as filler, pytest.raises(OSError):
                while True:
                    filler.write(bytes(4096))
        else:
            resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        for _ in range(2):
            child.terminal.send("q\n")
            child.terminal.expect(
                "❌ Emergency checkpoint not saved: (No space left on device|File too large). Training goes on: make room"
            )
            child.terminal.expect("step [0-9]+/")
        assert not list(directory.rglob("*.pt*"))
        (directory / "filler").unlink(missing_ok=True)
        resource.prlimit(
            child.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        )
        child.terminal.send("q\n")
        output = child.finish()
        assert child.exitcode == 0 and "Graceful exit completed" in output
        assert len(whole_files(directory)) == 1
        steps = [int(row["step"]) for row in metrics_without_times(directory)]
        assert steps == list(range(1, len(steps) + 1))  # the rows that did not fit have waited
    finally:
        if how == "small file system":
            child.close()
            subprocess.run(["umount", directory], check=True)
