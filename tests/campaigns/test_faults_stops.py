"""Campaigns: whatever stops a run, and wherever, what goes on is the same run, bit for bit."""

import itertools
import os
import random
import re
import shutil
import signal
from pathlib import Path

import helpers as h
import pytest
from driver import Campaign, comes_to_the_same_end, undisturbed, waiting

import train_graceful as t

STEPS = 12
ACCUM = 3
# 5 batches an epoch; every step is logged, so that no row may be lost or come twice.
SCHEDULE = "--save-every 2 --eval-every 4 --log-every 1 --keep 2 --warmup-steps 3".split()
SCHEDULE += ["--grad-accum", ACCUM, "--steps", STEPS]
MEANS = {"q": (0, "user_requested_graceful_exit")}
for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
    MEANS[name] = 128 + signal.Signals[name], f"signal_{name}"


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stops")
    return undisturbed(folder, *SCHEDULE, windows=5 * 2 * ACCUM + 2, context=16)


def loading(number: int, split: str = "training") -> h.Moment:
    """The batch after so many is being made."""
    return h.Moment("samples", where=lambda frame: frame.f_locals.get("key") == (split, number))


def within_the_fifth(mode: str) -> dict[str, h.Moment]:
    # Where an optimizer steps, in turn; each has a schedule, which takes a step when it is made.
    optimizers = ["Adam", "Muon", "AdamW"] if mode == "geometric" else ["AdamW"]
    return {
        "forward": h.Moment("loss", 4 * ACCUM + 3),
        "backward": h.Moment("backward", 4 * ACCUM + 3),
        **{f"optimizer {seam}": h.Moment(seam, 5) for seam in optimizers},
        "schedule": h.Moment("schedule", 5 * len(optimizers) + 1),
    }


def phases(mode: str) -> dict[str, tuple[h.Moment, range | None]]:
    """{phase: (its moment, the steps that the emergency checkpoint may have)}; no steps: all.

    None is before training.
    """
    return {
        "start-up before the monitor": (h.Moment("start"), None),
        "start-up after it": (h.Moment("train"), None),
        "first batch": (h.Moment("loss"), range(1, 2)),
        **{phase: (moment, range(5, 6)) for phase, moment in within_the_fifth(mode).items()},
        "evaluation": (h.Moment("evaluate"), range(4, 5)),
        "loading validation data": (loading(0, "validation"), range(4, 5)),
        "periodic save in flight": (h.saving("step_4.pt"), range(4, 7)),
        "epoch boundary": (loading(5), range(5, 6)),
        "last step": (h.Moment("loss", ACCUM * (STEPS - 1) + 1), range(STEPS, STEPS + 1)),
        "final save": (h.saving("final.pt"), range(0)),
        "last words": (h.Moment("summary"), range(0)),
        "teardown": (h.Moment("end"), range(0)),
    }


def stop(child: h.Child, means: str) -> None:
    if means == "q":
        child.terminal.send("q\n")
    else:
        child.kill(signal.Signals[means])


def stopped(fork, options, reference, directory, moment, steps, means) -> None:
    child = waiting(fork, moment, *options, "--checkpoint-dir", directory)
    stop(child, means)
    if steps is None:
        return ends_at_once(child, directory, moment, means)
    child.terminal.expect("Exit requested!")
    output = child.terminal.before
    child.go()
    output += child.finish()
    saved = t.load_checkpoint(h.saved_path(output))
    # It may be heard a moment after it has been acknowledged: after this batch, or the next.
    done = not steps or steps.stop > STEPS and saved["exit_reason"] == "completed"
    outcome = (0, "completed") if done else MEANS[means]
    assert (child.exitcode, saved["exit_reason"]) == outcome, output
    if done:
        return h.assert_same_run(directory, reference)
    assert saved["step"] in steps or saved["step"] == steps.stop < STEPS
    output = comes_to_the_same_end(fork, directory, reference)
    assert f"Resumed at step {saved['step']} of" in output


def ends_at_once(child, directory, moment, means) -> None:
    """There is nothing to save."""
    code = MEANS[means][0]
    if moment.seam == "start":  # no signal is heard yet
        child.go()
        code = code and -signal.Signals[means]
    assert "Traceback" not in h.ended(child, code) and not list(directory.rglob("*"))


def test_stopped_at_every_phase(fork, short_run, tmp_path, whole):
    kinds = "q, SIGINT, SIGTERM, SIGHUP, SIGUSR1"
    what = f"stopped by {kinds} at every phase of the three loops, then resumed"
    with Campaign(what) as campaign:
        cases = [
            (mode, *case) for mode in h.MODES for case in itertools.product(phases(mode), MEANS)
        ]
        if not whole:
            # Every phase once.
            random.Random(0).shuffle(cases)
            cases = {phase: (mode, phase, means) for mode, phase, means in cases}.values()
        for mode, phase, means in cases:
            directory = tmp_path / f"{mode}-{phase}-{means}".replace(" ", "-")
            how = directory, *phases(mode)[phase], means
            campaign.case(directory.name, stopped, fork, *short_run(mode), *how)


def stopped_often(fork, options, reference, directory, stops: int, seed: int) -> None:
    rng = random.Random(seed)
    for number in range(stops):
        means = rng.choice([*MEANS, "SIGKILL"])
        # In the start-up, or within the first six steps or so.
        trains = rng.random() < 0.75
        plan = [(h.Moment("samples"), lambda frame: None)] if trains else []
        plan += [(h.Moment("any call", rng.randrange(10, 12_000 if trains else 8000)), None)]
        child = fork(*options, "--resume", "auto", "--checkpoint-dir", directory, plan=plan)
        child.paused()
        stop(child, means)
        child.go()
        output = child.finish()
        code = MEANS[means][0] if means in MEANS else -9
        if means != "q" and "Exit requested" not in output and not trains:  # nobody listens yet
            code = -signal.Signals[means]
        where = f"seed {seed}, stop {number}, {means}: {output}"
        assert child.exitcode == code and "Traceback" not in output, where
        assert not (directory / "final.pt").exists(), where
    comes_to_the_same_end(fork, directory, reference)


def test_stopped_a_hundred_times(fork, short_run, tmp_path, whole):
    """Moments are counted in calls of functions, not in seconds: a seed stops at the same again."""
    what = "stops of three runs, 100 each, at random moments by random means, SIGKILL included"
    with Campaign(what) as campaign:
        steps, stops = (600, 100) if whole else (60, 10)
        for seed, mode in enumerate(h.MODES if whole else ["geometric"]):
            run = short_run(mode, "--steps", steps, "--save-every", 3)
            name = f"{mode}, seed {seed}"
            campaign.case(name, stopped_often, fork, *run, tmp_path / mode, stops, seed)
            campaign.cases += stops - 1


def poison(frame) -> None:
    frame.f_locals["self"].module.head.weight.grad.fill_(float("nan"))


def crashes(mode: str) -> dict[str, tuple[h.Moment, object, bool]]:
    """{what: (moment, act, whether a step may be half applied)}, all in the fifth step."""
    fifth = within_the_fifth(mode)
    return {
        "the data loader": (loading(4), h.fail, False),
        "forward": (fifth.pop("forward"), h.fail, False),
        "backward": (fifth.pop("backward"), h.fail, False),
        "a NaN": (h.Moment("clip", 5), poison, False),
        "before an optimizer's step": (h.Moment("clip", 5, event="return"), h.fail, False),
        "evaluation": (h.Moment("evaluate"), h.fail, False),
        **{f"half, {what}": (moment, h.fail, True) for what, moment in fifth.items()},
    }


def crashed_and_resumed(fork, options, reference, directory, moment, act, half) -> None:
    """Saved is the state after the fourth batch; if one is half applied nothing is."""
    child = fork(*options, "--checkpoint-dir", directory, plan=[(moment, act)])
    output = h.ended(child, 1)
    exception = "FloatingPointError" if act is poison else "RuntimeError"
    assert "Traceback (most recent call last)" in output and f"{exception}: " in output
    if half:
        assert "nothing half-updated is saved" in output
        assert f"Newest whole checkpoint: {directory}/step_4.pt" in output
        assert not (directory / "emergency_exit").exists()
    else:
        saved = t.load_checkpoint(h.saved_path(output))
        assert saved["step"] == 4 and saved["exit_reason"] == f"exception_{exception}"
    assert "Resumed at step 4" in comes_to_the_same_end(fork, directory, reference)


def worker_killed(fork, options, reference, directory) -> None:
    """As the kernel does it where memory is short."""
    words = *options, "--checkpoint-dir", directory, "--workers", 1
    child = waiting(fork, h.Moment("loss", ACCUM + 1), *words)
    os.kill(h.worker_pids(child.pid)[0], signal.SIGKILL)
    child.go()
    output = h.ended(child, 1)
    # PyTorch says that a worker is killed, or that the connection to it has gone.
    assert "Traceback (most recent call last)" in output and "dataloader.py" in output, output
    reason = t.load_checkpoint(h.saved_path(output))["exit_reason"]
    assert re.fullmatch("exception_[a-zA-Z]+Error", reason)
    assert h.processes_in_session(child.pid) == []
    comes_to_the_same_end(fork, directory, reference)


def test_crashes(fork, short_run, tmp_path, whole):
    what = "exceptions and NaN in every part of a step, killed workers; then resumed"
    with Campaign(what) as campaign:
        for mode in h.MODES if whole else ["geometric"]:
            for number, (what, how) in enumerate(crashes(mode).items()):
                case = *short_run(mode), tmp_path / f"{mode}-{number}", *how
                campaign.case(f"{mode}: {what}", crashed_and_resumed, fork, *case)
            case = *short_run(mode), tmp_path / f"{mode}-worker"
            campaign.case(f"{mode}: worker", worker_killed, fork, *case)


def typed_q(fork, options, directory, temporary, workers: int) -> None:
    words = ["--save-every", 5, "--checkpoint-dir", directory, "--workers", workers]
    child = fork(*options, *words, plan=[(h.AT_EXIT, None)], TMPDIR=str(temporary))
    child.terminal.expect("step [0-9]+/")
    child.terminal.send("q\n")
    child.paused()
    # The kernel may take longer than join(). Of torch's loader a thread and some pipes for each
    # worker end with the process.
    proc = Path(f"/proc/{child.pid}")
    h.wait_until(lambda: len(os.listdir(proc / "task")) <= 1 + workers)
    assert h.worker_pids(child.pid) == [], "a process is left"
    files = [os.readlink(fd) for fd in (proc / "fd").iterdir()]
    # The terminal, the lock, and this test's two pipes.
    names = sorted(re.sub(r"pts/[0-9]+|[0-9]+", "N", Path(file).name) for file in files)
    assert workers or names == ["N"] * 3 + ["pipe:[N]"] * 2 + ["run.lock"], files
    child.go()
    saved = t.load_checkpoint(h.saved_path(h.ended(child)))
    assert saved["exit_reason"] == MEANS["q"][1]
    assert h.processes_in_session(child.pid) == []
    assert not list(directory.rglob(".*")) and not list(temporary.iterdir())


def test_q_a_thousand_times(fork, short_run, tmp_path, whole):
    """Every one ends within the minute that finish() waits."""
    what = "q typed; exit code 0, whole checkpoint, no thread, descriptor, process or file left"
    # Workers' sockets need a short path.
    directory, temporary = tmp_path / "ck", tmp_path / "t"
    with Campaign(what) as campaign:
        for number in range(1000 if whole else 12):
            temporary.mkdir()
            options = [*short_run(list(h.MODES)[number % 3])[0], "--steps", 10**6]
            how = options, directory, temporary, 2 if number % 10 == 1 else 0
            campaign.case(number, typed_q, fork, *how)
            for folder in (directory, temporary):
                shutil.rmtree(folder, ignore_errors=True)
