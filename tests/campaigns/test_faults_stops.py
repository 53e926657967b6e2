"""Campaigns: whatever stops a run, and wherever, what goes on is the same run, bit for bit."""

import os
import random
import re
import shutil
import signal
import termios
from pathlib import Path

import pytest
from driver import Campaign, comes_to_the_same_end, ended, undisturbed
from helpers import (
    AT_EXIT,
    MODES,
    STATE_KEYS,
    Child,
    Moment,
    assert_same,
    assert_same_run,
    batch_complete,
    fail,
    frame_asks_to_leave,
    processes_in_session,
    saved_path,
    saving,
    wait_until,
    worker_pids,
)

import train_graceful as t

STEPS = 12
ACCUM = 3
# 5 batches an epoch; every step is logged, so that no row may be lost or come twice.
SCHEDULE = (
    f"--grad-accum {ACCUM} --steps {STEPS} --save-every 2 --eval-every 4 --log-every 1 --keep 2 "
    "--warmup-steps 3"
).split()
MEANS = {
    "q": (0, "user_requested_graceful_exit"),
    "SIGINT": (130, "signal_SIGINT"),
    "SIGTERM": (143, "signal_SIGTERM"),
    "SIGHUP": (129, "signal_SIGHUP"),
    "SIGUSR1": (138, "signal_SIGUSR1"),
}
START_UP = {"start-up before the monitor": "start", "start-up after it": "train"}


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stops")
    return undisturbed(folder, *SCHEDULE, windows=5 * 2 * ACCUM + 2, context=16)


def optimizers(mode: str) -> list[str]:
    """The seams of a batch where an optimizer steps, in turn; each has a schedule."""
    return ["Adam", "Muon", "AdamW"] if mode == "geometric" else ["AdamW"]


def loading(number: int, split: str = "training") -> Moment:
    """The batch after so many is being made."""
    return Moment("samples", where=lambda frame: frame.f_locals.get("key") == (split, number))


def within_the_fifth(mode: str) -> dict[str, Moment]:
    return {
        "forward": Moment("loss", 4 * ACCUM + 3),
        "backward": Moment("backward", 4 * ACCUM + 3),
        **{f"optimizer {seam}": Moment(seam, 5) for seam in optimizers(mode)},
        # Each takes a step when it is made.
        "schedule": Moment("schedule", 5 * len(optimizers(mode)) + 1),
    }


def phases(mode: str) -> dict[str, tuple[Moment, range]]:
    """{phase: (its moment, the steps that the emergency checkpoint may have)}; no steps: all."""
    return {
        "first batch": (Moment("loss"), range(1, 2)),
        **{phase: (moment, range(5, 6)) for phase, moment in within_the_fifth(mode).items()},
        "evaluation": (Moment("evaluate"), range(4, 5)),
        "loading validation data": (loading(0, "validation"), range(4, 5)),
        "periodic save in flight": (saving("step_4.pt"), range(4, 7)),
        "epoch boundary": (loading(5), range(5, 6)),
        "last step": (Moment("loss", ACCUM * (STEPS - 1) + 1), range(STEPS, STEPS + 1)),
        "final save": (saving("final.pt"), range(0)),
        "last words": (Moment("summary"), range(0)),
        "teardown": (Moment("end"), range(0)),
    }


def stop(child: Child, means: str) -> None:
    if means == "q":
        child.terminal.send("q\n")
    else:
        child.kill(signal.Signals[means])


def stopped_and_resumed(fork, options, reference, directory, moment, steps, means) -> None:
    child = fork(*options, "--checkpoint-dir", directory, plan=[(moment, None)])
    child.paused()
    settings = termios.tcgetattr(child.terminal.fileno())
    stop(child, means)
    child.terminal.expect("Exit requested!")
    output = child.terminal.before
    child.go()
    code, reason = MEANS[means] if steps else (0, "completed")
    saved = t.load_checkpoint(saved_path(output + ended(child, code, settings)))
    assert saved["exit_reason"] == reason
    if not steps:
        return assert_same_run(directory, reference)
    # It may be heard a moment after it has been acknowledged: after this batch, or the next.
    assert saved["step"] in steps or saved["step"] == steps.stop < STEPS
    output = comes_to_the_same_end(fork, directory, reference)
    assert f"Resumed at step {saved['step']} of" in output


def stopped_before_training(fork, options, reference, directory, moment, means) -> None:
    """It ends at once; there is nothing to save, and the same command starts the run."""
    child = fork(*options, "--checkpoint-dir", directory, plan=[(moment, None)])
    child.paused()
    settings = termios.tcgetattr(child.terminal.fileno())
    stop(child, means)
    heard = moment.seam == "train"
    if not heard:
        child.go()
    output = child.finish(settings)
    if heard or means == "q":
        assert "🛑 Exit requested. Training has not begun: there is nothing to save." in output
        assert child.exitcode == MEANS[means][0], output
    else:
        assert child.exitcode == -signal.Signals[means], output
    assert "Traceback" not in output and not list(directory.rglob("*"))
    ended(fork(*options, "--checkpoint-dir", directory))
    assert_same_run(directory, reference)


def test_stopped_at_every_phase(fork, short_run, tmp_path, whole):
    kinds = "q, SIGINT, SIGTERM, SIGHUP, SIGUSR1"
    with Campaign(
        f"stopped by {kinds} at every phase of the three loops, then resumed"
    ) as campaign:
        cases = [
            (mode, phase, means)
            for mode in MODES
            for phase in [*START_UP, *phases(mode)]
            for means in MEANS
        ]
        if not whole:
            # Every phase once; every means and every mode come up.
            random.Random(0).shuffle(cases)
            cases = list({phase: (mode, phase, means) for mode, phase, means in cases}.values())
            modes, _, means = map(set, zip(*cases))
            assert modes == {*MODES} and means == {*MEANS}
        for mode, phase, means in cases:
            directory = tmp_path / f"{mode}-{phase}-{means}".replace(" ", "-")
            if phase in START_UP:
                check, planned = stopped_before_training, (Moment(START_UP[phase]),)
            else:
                check, planned = stopped_and_resumed, phases(mode)[phase]
            campaign.case(directory.name, check, fork, *short_run(mode), directory, *planned, means)


def stopped_often(fork, options, reference, directory, stops: int, seed: int) -> None:
    rng = random.Random(seed)
    for number in range(stops):
        means = rng.choice([*MEANS, "SIGKILL"])
        # In the start-up, or within the first six steps or so.
        trains = rng.random() < 0.75
        plan = [(Moment("samples"), lambda frame: None)] if trains else []
        plan += [(Moment("any call", rng.randrange(10, 12_000 if trains else 8000)), None)]
        words = ["--resume", "latest"] if list(directory.rglob("[!.]*.pt")) else options
        child = fork(*words, "--checkpoint-dir", directory, plan=plan)
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
        for seed, mode in enumerate(MODES if whole else ["geometric"]):
            run = short_run(mode, "--steps", steps, "--save-every", 3)
            name = f"{mode}, seed {seed}"
            campaign.case(name, stopped_often, fork, *run, tmp_path / mode, stops, seed)
            campaign.cases += stops - 1


def poison(frame) -> None:
    frame.f_locals["self"].module.head.weight.grad.fill_(float("nan"))


def crashes(mode: str) -> dict[str, tuple[Moment, object]]:
    """All in the fifth step, where none of its halves has been applied yet."""
    fifth = within_the_fifth(mode)
    return {
        "the data loader": (loading(4), fail),
        "forward": (fifth["forward"], fail),
        "backward": (fifth["backward"], fail),
        "a NaN": (Moment("clip", 5), poison),
        "before the first optimizer's step": (Moment("clip", 5, event="return"), fail),
        "evaluation": (Moment("evaluate"), fail),
    }


def crashed_and_resumed(fork, options, reference, directory, moment, act) -> None:
    """The checkpoint is the state after the fourth batch; the resumed run is the run."""
    plan = [(batch_complete(4), frame_asks_to_leave)]
    fourth = fork(*options, "--checkpoint-dir", directory / "fourth", plan=plan)
    expected = t.load_checkpoint(saved_path(fourth.finish()))
    # Its evaluation is still to come.
    assert expected["step"] == 4 and expected["metrics"]["counts"] == {"loss": 1}
    plan = [(Moment("start"), None), (moment, act)]
    child = fork(*options, "--checkpoint-dir", directory / "ck", plan=plan)
    child.paused()
    settings = termios.tcgetattr(child.terminal.fileno())
    child.go()
    output = ended(child, 1, settings)
    exception = "FloatingPointError" if act is poison else "RuntimeError"
    text = f"{exception}: " + "injected" * (act is fail)
    assert "Traceback (most recent call last)" in output and text in output
    saved = t.load_checkpoint(saved_path(output))
    assert saved["exit_reason"] == f"exception_{exception}"
    # Those two are the fourth step's, unless it failed.
    same = [key for key in STATE_KEYS if key not in ("best", "evaluation")]
    assert_same({key: saved[key] for key in same}, {key: expected[key] for key in same})
    comes_to_the_same_end(fork, directory / "ck", reference)


def crashed_between_the_halves(fork, options, reference, directory, moment) -> None:
    """Nothing half-updated is saved; the newest whole checkpoint is named."""
    child = fork(*options, "--checkpoint-dir", directory, plan=[(moment, fail)])
    output = ended(child, 1)
    assert "RuntimeError: injected" in output and "nothing half-updated is saved" in output
    assert f"Newest whole checkpoint: {directory}/step_4.pt" in output
    assert not (directory / "emergency_exit").exists()
    assert "Resumed at step 4" in comes_to_the_same_end(fork, directory, reference)


def worker_killed(fork, options, reference, directory) -> None:
    """As the kernel does it where memory is short."""
    temporary = directory.with_name("tmp")  # short: workers have sockets there
    temporary.mkdir(parents=True, exist_ok=True)
    words = ["--checkpoint-dir", directory, "--workers", 1]
    plan = [(Moment("loss", ACCUM + 1), None)]
    child = fork(*options, *words, plan=plan, TMPDIR=str(temporary))
    child.paused()
    os.kill(worker_pids(child.pid)[0], signal.SIGKILL)
    child.go()
    output = ended(child, 1)
    # PyTorch says that a worker is killed, or that the connection to it has gone.
    assert "Traceback (most recent call last)" in output and "dataloader.py" in output, output
    kinds = "Runtime|ConnectionReset|FileNotFound|ConnectionRefused|EOF"
    reason = t.load_checkpoint(saved_path(output))["exit_reason"]
    assert re.fullmatch(f"exception_({kinds})Error", reason)
    assert processes_in_session(child.pid) == [] and not list(temporary.iterdir())
    comes_to_the_same_end(fork, directory, reference)


def test_crashes(fork, short_run, tmp_path, whole):
    what = "exceptions and NaN in every part of a step, killed workers; then resumed"
    with Campaign(what) as campaign:
        for mode in MODES if whole else ["geometric"]:
            run, folder = short_run(mode), tmp_path / mode
            for number, (what, how) in enumerate(crashes(mode).items()):
                name = f"{mode}: {what}"
                campaign.case(name, crashed_and_resumed, fork, *run, folder / f"{number}", *how)
            for what, moment in list(within_the_fifth(mode).items())[2:]:
                directory = folder / what.replace(" ", "-")
                name = f"{mode}: half, {what}"
                campaign.case(name, crashed_between_the_halves, fork, *run, directory, moment)
            campaign.case(f"{mode}: worker", worker_killed, fork, *run, folder / "worker")


def typed_q(fork, options, directory, temporary, number: int) -> None:
    workers = 2 if number % 10 == 1 else 0
    words = ["--save-every", 5, "--checkpoint-dir", directory, "--workers", workers]
    child = fork(*options, *words, plan=[(AT_EXIT, None)], TMPDIR=str(temporary))
    child.terminal.expect("step [0-9]+/")
    settings = termios.tcgetattr(child.terminal.fileno())
    child.terminal.send("q\n")
    child.paused()
    # The kernel may take longer than join(). Of torch's loader a thread and some pipes for each
    # worker end with the process.
    proc = Path(f"/proc/{child.pid}")
    wait_until(lambda: len(os.listdir(proc / "task")) <= 1 + workers)
    assert worker_pids(child.pid) == [], "a process is left"
    files = [os.readlink(fd) for fd in (proc / "fd").iterdir()]
    # The terminal, the lock, and this test's two pipes.
    names = sorted(re.sub(r"pts/[0-9]+|[0-9]+", "N", Path(file).name) for file in files)
    assert workers or names == ["N"] * 3 + ["pipe:[N]"] * 2 + ["run.lock"], files
    child.go()
    saved = t.load_checkpoint(saved_path(ended(child, 0, settings)))
    assert saved["exit_reason"] == MEANS["q"][1]
    assert processes_in_session(child.pid) == []


def typed_q_early(fork, options, directory, temporary, number: int) -> None:
    """As early as can be: before training there is nothing to save."""
    words = ["--checkpoint-dir", directory, "--workers", number % 2]
    child = fork(*options, *words, TMPDIR=str(temporary))
    settings = termios.tcgetattr(child.terminal.fileno())
    child.terminal.send("q\n")
    output = ended(child, 0, settings)
    assert "there is nothing to save" in output or "Graceful exit completed" in output, output
    assert processes_in_session(child.pid) == []


def test_q_a_thousand_times(fork, short_run, tmp_path, whole):
    """Every one ends within the minute that finish() waits."""
    what = "q typed; exit code 0, whole checkpoint, no thread, descriptor, process or file left"
    # Workers' sockets need a short path.
    directory, temporary = tmp_path / "ck", tmp_path / "t"

    def typed(number: int) -> None:
        options = [*short_run(list(MODES)[number % 3])[0], "--steps", 10**6]
        check = typed_q if number % 5 else typed_q_early
        check(fork, options, directory, temporary, number)
        assert not list(directory.rglob(".*")) and not list(temporary.iterdir())

    with Campaign(what) as campaign:
        for number in range(1000 if whole else 20):
            temporary.mkdir()
            campaign.case(number, typed, number)
            for folder in (directory, temporary):
                shutil.rmtree(folder, ignore_errors=True)
