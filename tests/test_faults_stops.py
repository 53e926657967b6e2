"""Campaigns: stopped at every phase, a hundred times, by exceptions, and by a thousand q's. The run is always the same run."""

import os
import random
import re
import shutil
import signal
import termios
from pathlib import Path

import pytest
from campaign import Campaign, Child, Moment, ask_to_leave
from conftest import MODES, processes_in_session, wait_until
from test_faults_saves import SMALL
from test_resume import STATE_KEYS, assert_same, corpus_of, metrics_without_times

import train_graceful as t

STEPS = 12
ACCUM = 6
# 5 batches an epoch, 2 in an evaluation; every step is logged, so that no row may be lost or come twice
SCHEDULE = ["--steps", STEPS, "--save-every", 2, "--eval-every", 4, "--log-every", 1, "--keep", 2, "--warmup-steps", 3]
MEANS = {"q": (0, "user_requested_graceful_exit"), "SIGINT": (130, "signal_SIGINT"), "SIGTERM": (143, "signal_SIGTERM"),
         "SIGHUP": (129, "signal_SIGHUP"), "SIGUSR1": (138, "signal_SIGUSR1")}


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """(options, directory of the uninterrupted run) by mode."""
    folder = tmp_path_factory.mktemp("stops")
    corpus = corpus_of(folder / "corpus.txt", windows=5 * 2 * ACCUM + 2)
    made = {}
    for mode in MODES:
        made[mode] = ["--data", corpus, *SMALL, "--context", 16, "--grad-accum", ACCUM, *SCHEDULE, *MODES[mode]], folder / mode
        child = Child(*made[mode][0], "--checkpoint-dir", folder / mode)
        child.finish()
        assert child.exitcode == 0 and t.load_checkpoint(folder / mode / "final.pt")["epoch"] == 2
    return made


def stop(child: Child, means: str) -> None:
    if means == "q":
        child.terminal.send("q\n")
    else:
        child.kill(signal.Signals[means])


def assert_same_end(directory: Path, reference: Path) -> None:
    a, b = t.load_checkpoint(directory / "final.pt"), t.load_checkpoint(reference / "final.pt")
    assert_same({key: a[key] for key in STATE_KEYS}, {key: b[key] for key in STATE_KEYS})
    assert metrics_without_times(directory) == metrics_without_times(reference)


def saving(name: str) -> Moment:
    return Moment("write_checkpoint", where=lambda frame: Path(frame.f_locals["path"]).name == name)


def phases(mode: str) -> dict[str, tuple[Moment, range]]:
    """{phase: (its moment, the steps that the emergency checkpoint may have)}; no steps: the run is complete."""
    schedulers = 3 if mode == "geometric" else 1
    optimizers = {"optimizer": Moment("step", 5, file="adam.py")}
    if mode == "geometric":
        optimizers = {"rotation optimizer": Moment("step", 9, file="adam.py"), "expert optimizer": Moment("step", 5, file="_muon.py"),
                      "embedding optimizer": Moment("step", 10, file="adam.py")}
    return {
        "start-up before the monitor": (Moment("parse_options"), range(1)),
        "start-up after it": (Moment("fingerprint"), range(1)),
        "first batch": (Moment("forward_backward"), range(1, 2)),
        "forward": (Moment("task_loss", 4 * ACCUM + 3, where=lambda frame: frame.f_back.f_code.co_name == "forward_backward"), range(5, 6)),
        "backward": (Moment("backward", 4 * ACCUM + 3, file="_tensor.py"), range(5, 6)),
        **{name: (moment, range(5, 6)) for name, moment in optimizers.items()},
        # each scheduler takes a step when it is made
        "scheduler": (Moment("step", 5 * schedulers + 1, file="lr_scheduler.py"), range(5, 6)),
        "evaluation": (Moment("task_loss", 2, where=lambda frame: frame.f_back.f_code.co_name == "evaluate"), range(4, 5)),
        "periodic save in flight": (saving("step_4.pt"), range(4, 7)),
        "epoch boundary": (Moment("batches", where=lambda frame: frame.f_locals["epoch"] == 1), range(5, 6)),
        "last step": (Moment("forward_backward", STEPS), range(STEPS, STEPS + 1)),
        "final save": (saving("final.pt"), range(0)),
        "teardown": (Moment("close", where=lambda frame: type(frame.f_locals["self"]).__name__ == "Run"), range(0)),
        "last words": (Moment("summary"), range(0)),
    }


def stopped_and_resumed(fork, options, reference, directory, moment: Moment, steps: range, phase: str, means: str) -> None:
    child = fork(*options, "--checkpoint-dir", directory, plan=[(moment, None)])
    child.paused()
    settings = termios.tcgetattr(child.terminal.fileno())
    stop(child, means)
    if phase not in ("start-up before the monitor", "last words"):  # nobody listens there: what comes early is heard later
        child.terminal.expect("Exit requested!")
    output = child.terminal.before or ""
    child.go()
    output += child.finish(settings)
    code, reason = MEANS[means] if steps else (0, "completed")
    assert child.exitcode == code, output
    saved = t.load_checkpoint(re.search(r"checkpoint saved: (\S+)", output)[1])
    assert saved["exit_reason"] == reason
    if steps:
        assert saved["step"] in steps
        child = fork("--resume", "latest", "--checkpoint-dir", directory)
        output = child.finish()
        assert child.exitcode == 0 and f"Resumed at step {saved['step']} of" in output, output
    assert_same_end(directory, reference)


def test_stopped_at_every_phase(fork, short_run, tmp_path, whole):
    with Campaign("stopped by q, SIGINT, SIGTERM, SIGHUP, SIGUSR1 at every phase of the three loops, then resumed") as campaign:
        turn = 0
        for mode in MODES:
            options, reference = short_run[mode]
            for phase in phases(mode):
                for means in MEANS:
                    turn += 1
                    if whole or turn % 11 == 0:  # every phase, every means and every mode come up
                        moment, steps = phases(mode)[phase]
                        directory = tmp_path / f"{mode}-{phase}-{means}".replace(" ", "-")
                        campaign.case(directory.name, stopped_and_resumed, fork, options, reference, directory, moment, steps, phase, means)


def stopped_often(fork, options, reference, directory, stops: int, seed: int) -> None:
    rng = random.Random(seed)
    made = 0
    while made < stops:
        means = rng.choice([*MEANS, "SIGKILL"])
        moment = Moment("", rng.randrange(1, 8000))
        begun = list(directory.rglob("[!.]*.pt"))
        child = fork(*(["--resume", "latest"] if begun else options), "--checkpoint-dir", directory, plan=[(moment, None)])
        child.paused()
        stop(child, means)
        child.go()
        output = child.finish()
        assert child.exitcode == (-9 if means == "SIGKILL" else MEANS[means][0]), f"seed {seed}, stop {made}, {means}: {output}"
        made += 1
        assert not (directory / "final.pt").exists(), f"seed {seed}: done after {made} stops"
    child = fork("--resume", "latest", "--checkpoint-dir", directory)
    child.finish()
    assert child.exitcode == 0
    assert_same_end(directory, reference)


def test_stopped_a_hundred_times(fork, short_run, tmp_path, whole):
    """Moments are counted in calls of Python functions, not in seconds: the same seed stops at the same ones again."""
    with Campaign("stops of three runs, 100 each, at random moments by random means, SIGKILL included") as campaign:
        for seed, mode in enumerate(MODES if whole else ["geometric"]):
            options, stops = [*short_run[mode][0], "--steps", 600 if whole else 60, "--save-every", 3], 100 if whole else 10
            child = fork(*options, "--checkpoint-dir", tmp_path / f"{mode}-reference")
            child.finish()
            assert child.exitcode == 0
            campaign.case(f"{mode}, seed {seed}", stopped_often, fork, options, tmp_path / f"{mode}-reference", tmp_path / mode, stops, seed)
            campaign.cases += stops - 1


def fail(frame) -> None:
    raise RuntimeError("injected")


def poison(frame) -> None:
    frame.f_locals["model"].head.weight.grad.fill_(float("nan"))


def crashes(mode: str) -> dict[str, tuple[Moment, object, str]]:
    """{what: (moment, act, the exception)}; all in the fifth step, where none of its halves has been applied yet."""
    return {
        "the data loader": (Moment("__getitem__", 5), fail, "RuntimeError"),
        "forward": (Moment("task_loss", 4 * ACCUM + 3), fail, "RuntimeError"),
        "backward": (Moment("backward", 4 * ACCUM + 3, file="_tensor.py"), fail, "RuntimeError"),
        "a NaN": (Moment("clip_gradients", 5), poison, "FloatingPointError"),
        "the first optimizer, before its step": (Moment("_update_begins", 4 * (3 if mode == "geometric" else 1) + 1), fail, "RuntimeError"),
        "evaluation": (Moment("task_loss", where=lambda frame: frame.f_back.f_code.co_name == "evaluate"), fail, "RuntimeError"),
    }


def crashed_and_resumed(fork, options, reference, directory, moment: Moment, act, exception: str) -> None:
    """The checkpoint is the state after the fourth batch, its random state included; the resumed run is the run."""
    fourth = fork(*options, "--checkpoint-dir", directory / "fourth", plan=[(Moment("batch_done", 4), ask_to_leave)])
    expected = t.load_checkpoint(re.search(r"checkpoint saved: (\S+)", fourth.finish())[1])
    assert expected["step"] == 4 and expected["metrics"]["loss_count"] == 1  # its evaluation is still to come
    child = fork(*options, "--checkpoint-dir", directory / "ck", plan=[(Moment("train"), None), (moment, act)])
    child.paused()
    settings = termios.tcgetattr(child.terminal.fileno())
    child.go()
    output = child.finish(settings)
    assert child.exitcode == 1
    assert "Traceback (most recent call last)" in output and f"{exception}: " in output
    assert "injected" in output or exception == "FloatingPointError"
    saved = t.load_checkpoint(re.search(r"Emergency checkpoint saved: (\S+)", output)[1])
    assert saved["exit_reason"] == f"exception_{exception}"
    same = [key for key in STATE_KEYS if key != "best_loss"]  # which the evaluation of the fourth step has set, unless it failed
    assert_same({key: saved[key] for key in same}, {key: expected[key] for key in same})
    child = fork("--resume", "latest", "--checkpoint-dir", directory / "ck")
    child.finish()
    assert child.exitcode == 0
    assert_same_end(directory / "ck", reference)


def crashed_between_the_halves(fork, options, reference, directory, moment: Moment) -> None:
    """Nothing half-updated is saved; the newest whole checkpoint is named."""
    child = fork(*options, "--checkpoint-dir", directory, plan=[(moment, fail)])
    output = child.finish()
    assert child.exitcode == 1 and "RuntimeError: injected" in output
    assert f"Newest whole checkpoint: {directory}/step_4.pt" in output and "nothing half-updated is saved" in output
    assert not (directory / "emergency_exit").exists()
    child = fork("--resume", "latest", "--checkpoint-dir", directory)
    assert "Resumed at step 4" in child.finish() and child.exitcode == 0
    assert_same_end(directory, reference)


def worker_killed(fork, options, reference, directory) -> None:
    """As the kernel does it where memory is short."""
    temporary = directory.with_name("tmp")  # short: workers have sockets there
    temporary.mkdir(parents=True, exist_ok=True)
    child = fork(*options, "--checkpoint-dir", directory, "--workers", 1, plan=[(Moment("forward_backward", 2), None)], TMPDIR=str(temporary))
    child.paused()
    worker = int(Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text())
    os.kill(worker, signal.SIGKILL)
    child.go()
    output = child.finish()
    # PyTorch says "DataLoader worker ... is killed", or that the connection over which it sent a batch has gone.
    assert child.exitcode == 1 and "Traceback (most recent call last)" in output and "dataloader.py" in output, output
    saved = t.load_checkpoint(re.search(r"Emergency checkpoint saved: (\S+)", output)[1])
    assert saved["exit_reason"] in ("exception_RuntimeError", "exception_ConnectionResetError", "exception_FileNotFoundError",
                                    "exception_ConnectionRefusedError", "exception_EOFError")
    assert processes_in_session(child.pid) == [] and not list(temporary.iterdir())
    child = fork("--resume", "latest", "--checkpoint-dir", directory)
    child.finish()
    assert child.exitcode == 0
    assert_same_end(directory, reference)


def test_crashes(fork, short_run, tmp_path, whole):
    with Campaign("exceptions and NaN in every part of a step, killed workers; then resumed") as campaign:
        for mode in MODES if whole else ["geometric"]:
            options, reference = short_run[mode]
            for what in crashes(mode):
                campaign.case(f"{mode}: {what}", crashed_and_resumed, fork, options, reference, tmp_path / mode / what.replace(" ", "-"),
                              *crashes(mode)[what])
            halves = [Moment("step", 5, file="adam.py"), Moment("step", (3 if mode == "geometric" else 1) * 5 + 1, file="lr_scheduler.py")]
            if mode == "geometric":
                halves += [Moment("step", 5), Moment("step", 10, file="adam.py")]  # BatchedMuon's is the script's only one
                halves[0] = Moment("step", 9, file="adam.py")
            for number, moment in enumerate(halves):
                campaign.case(f"{mode}: {moment.file}", crashed_between_the_halves, fork, options, reference,
                              tmp_path / f"{mode}-{number}", moment)
            campaign.case(f"{mode}: worker", worker_killed, fork, options, reference, tmp_path / f"{mode}-worker")


def typed_q(fork, options, directory, temporary, number: int) -> None:
    workers = 2 if number % 10 == 0 else 0
    child = fork(*options, "--steps", 10**6, "--save-every", 5, "--checkpoint-dir", directory, "--workers", workers,
                 plan=[(Moment("main", event="return"), None)], TMPDIR=str(temporary))
    if number % 5:
        child.terminal.expect("step [0-9]+/")  # else it is typed as early as can be
    settings = termios.tcgetattr(child.terminal.fileno())
    child.terminal.send("q\n")
    child.paused()
    wait_until(lambda: os.listdir(f"/proc/{child.pid}/task") == [str(child.pid)])  # the kernel may take longer than join()
    assert Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text() == "", "a process is left"
    files = [os.readlink(f"/proc/{child.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{child.pid}/fd")]
    # the terminal, the lock, and this test's two pipes
    assert sorted(re.sub(r"pts/[0-9]+|[0-9]+", "N", Path(file).name) for file in files) == ["N"] * 3 + ["pipe:[N]"] * 2 + ["run.lock"], files
    child.go()
    output = child.finish(settings)
    assert child.exitcode == 0, output
    assert t.load_checkpoint(re.search(r"checkpoint saved: (\S+)", output)[1])["exit_reason"] == MEANS["q"][1]
    assert processes_in_session(child.pid) == []
    assert not list(directory.rglob(".*")) and not list(temporary.iterdir())


def test_q_a_thousand_times(fork, short_run, tmp_path, whole):
    """Every one ends within the minute that finish() waits."""
    with Campaign("q typed; exit code 0, whole checkpoint, no thread, descriptor, process or file left") as campaign:
        temporary = tmp_path / "t"  # workers' sockets need a short path
        temporary.mkdir()
        for number in range(1000 if whole else 20):
            mode = list(MODES)[number % 3]
            campaign.case(f"{mode} {number}", typed_q, fork, short_run[mode][0], tmp_path / "ck", temporary, number)
            shutil.rmtree(tmp_path / "ck", ignore_errors=True)  # a case that failed may have made none
