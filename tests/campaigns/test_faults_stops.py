"""Campaigns: stopped at every phase, a hundred times, by exceptions, and by a thousand q's. The run is always the same run."""

import os
import random
import re
import shutil
import signal
import termios
from pathlib import Path

import pytest
from driver import SMALL, Campaign
from helpers import (
    AT_EXIT,
    MODES,
    STATE_KEYS,
    Child,
    Moment,
    assert_same,
    assert_same_run,
    batch_complete,
    corpus_of,
    frame_asks_to_leave,
    processes_in_session,
    saving,
    wait_until,
)

import train_graceful as t

STEPS = 12
ACCUM = 3
# 5 batches an epoch, 2 in an evaluation; every step is logged, so that no row may be lost or come twice
SCHEDULE = [
    "--steps",
    STEPS,
    "--save-every",
    2,
    "--eval-every",
    4,
    "--log-every",
    1,
    "--keep",
    2,
    "--warmup-steps",
    3,
]
MEANS = {
    "q": (0, "user_requested_graceful_exit"),
    "SIGINT": (130, "signal_SIGINT"),
    "SIGTERM": (143, "signal_SIGTERM"),
    "SIGHUP": (129, "signal_SIGHUP"),
    "SIGUSR1": (138, "signal_SIGUSR1"),
}


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """(options, directory of the uninterrupted run) by mode."""
    folder = tmp_path_factory.mktemp("stops")
    corpus = corpus_of(folder / "corpus.txt", windows=5 * 2 * ACCUM + 2, context=16)
    made = {}
    for mode in MODES:
        made[mode] = (
            [
                "--data",
                corpus,
                *SMALL,
                "--context",
                16,
                "--grad-accum",
                ACCUM,
                *SCHEDULE,
                *MODES[mode],
            ],
            folder / mode,
        )
        child = Child(*made[mode][0], "--checkpoint-dir", folder / mode)
        output = child.finish()
        assert child.exitcode == 0 and "5 batches of 6 an epoch" in output and "Epoch: 2" in output
    return made


def stop(child: Child, means: str) -> None:
    if means == "q":
        child.terminal.send("q\n")
    else:
        child.kill(signal.Signals[means])


def muon_step(nth: int) -> Moment:
    return Moment(
        "step", nth, where=lambda frame: type(frame.f_locals["self"]).__name__ == "BatchedMuon"
    )


def loading(number: int, split: str = "training", nth: int = 1) -> Moment:
    """The batch after so many is being made."""
    return Moment(
        "__getitem__", nth, where=lambda frame: frame.f_locals.get("key") == (split, number)
    )


START_UP = {"start-up before the monitor": "parse_options", "start-up after it": "fingerprint"}


def phases(mode: str) -> dict[str, tuple[Moment, range]]:
    """{phase: (its moment, the steps that the emergency checkpoint may have)}; no steps: the run is complete."""
    schedulers = 3 if mode == "geometric" else 1
    optimizers = {"optimizer": Moment("step", 5, file="adam.py")}
    if mode == "geometric":
        optimizers = {
            "rotation optimizer": Moment("step", 9, file="adam.py"),
            "expert optimizer": muon_step(5),
            "embedding optimizer": Moment("step", 10, file="adam.py"),
        }
    return {
        "first batch": (Moment("forward_backward"), range(1, 2)),
        "forward": (Moment("loss", 4 * ACCUM + 3), range(5, 6)),
        "backward": (Moment("backward", 4 * ACCUM + 3, file="_tensor.py"), range(5, 6)),
        **{name: (moment, range(5, 6)) for name, moment in optimizers.items()},
        # each scheduler takes a step when it is made
        "scheduler": (Moment("step", 5 * schedulers + 1, file="lr_scheduler.py"), range(5, 6)),
        "evaluation": (Moment("evaluate"), range(4, 5)),
        "loading validation data": (loading(0, "validation"), range(4, 5)),
        "periodic save in flight": (saving("step_4.pt"), range(4, 7)),
        "epoch boundary": (loading(5), range(5, 6)),
        "last step": (Moment("forward_backward", STEPS), range(STEPS, STEPS + 1)),
        "final save": (saving("final.pt"), range(0)),
        "teardown": (
            Moment("_close_loader"),
            range(0),
        ),
        "last words": (Moment("summary"), range(0)),
    }


def stopped_and_resumed(
    fork, options, reference, directory, moment: Moment, steps: range, means: str
) -> None:
    child = fork(*options, "--checkpoint-dir", directory, plan=[(moment, None)])
    child.paused()
    settings = termios.tcgetattr(child.terminal.fileno())
    stop(child, means)
    child.terminal.expect("Exit requested!")
    output = child.terminal.before or ""
    child.go()
    output += child.finish(settings)
    code, reason = MEANS[means] if steps else (0, "completed")
    assert child.exitcode == code, output
    saved = t.load_checkpoint(re.search(r"checkpoint saved: (\S+)", output)[1])
    assert saved["exit_reason"] == reason
    if steps:
        # It may be heard a moment after it has been acknowledged: after this batch, or the next.
        assert saved["step"] in steps or saved["step"] == steps.stop < STEPS
        child = fork("--resume", "latest", "--checkpoint-dir", directory)
        output = child.finish()
        assert child.exitcode == 0 and f"Resumed at step {saved['step']} of" in output, output
    assert_same_run(directory, reference)


def stopped_before_training(
    fork, options, reference, directory, moment: Moment, means: str
) -> None:
    """It ends at once, and says so once it listens; there is nothing to save, and the same command starts the run."""
    child = fork(*options, "--checkpoint-dir", directory, plan=[(moment, None)])
    child.paused()
    settings = termios.tcgetattr(child.terminal.fileno())
    stop(child, means)
    if moment.function == "parse_options":
        child.go()
    output = child.finish(settings)
    if "Exit requested" in output:
        assert "🛑 Exit requested. Training has not begun: there is nothing to save." in output
        assert child.exitcode == MEANS[means][0], output
    else:
        assert moment.function == "parse_options" and child.exitcode == -signal.Signals[means], (
            output
        )
    assert "Traceback" not in output and not list(directory.rglob("*"))
    child = fork(*options, "--checkpoint-dir", directory)
    child.finish()
    assert child.exitcode == 0
    assert_same_run(directory, reference)


def test_stopped_at_every_phase(fork, short_run, tmp_path, whole):
    with Campaign(
        "stopped by q, SIGINT, SIGTERM, SIGHUP, SIGUSR1 at every phase of the three loops, then resumed"
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
            assert {mode for mode, _, _ in cases} == {*MODES} and {
                means for _, _, means in cases
            } == {*MEANS}
        for mode, phase, means in cases:
            options, reference = short_run[mode]
            directory = tmp_path / f"{mode}-{phase}-{means}".replace(" ", "-")
            if phase in START_UP:
                check, planned = stopped_before_training, (Moment(START_UP[phase]),)
            else:
                check, planned = stopped_and_resumed, phases(mode)[phase]
            campaign.case(
                directory.name, check, fork, options, reference, directory, *planned, means
            )


def stopped_often(fork, options, reference, directory, stops: int, seed: int) -> None:
    rng = random.Random(seed)
    made = 0
    while made < stops:
        means = rng.choice([*MEANS, "SIGKILL"])
        # in the start-up, or within the first six steps or so
        begin = (
            [(Moment("_introduce", event="return"), lambda frame: None)]
            if rng.random() < 0.75
            else []
        )
        moment = Moment("", rng.randrange(10, 12_000 if begin else 8000))
        begun = list(directory.rglob("[!.]*.pt"))
        child = fork(
            *(["--resume", "latest"] if begun else options),
            "--checkpoint-dir",
            directory,
            plan=[*begin, (moment, None)],
        )
        child.paused()
        stop(child, means)
        child.go()
        output = child.finish()
        codes = [MEANS[means][0]] if means in MEANS else [-9]
        if means != "q" and "Exit requested" not in output and not begin:  # nobody listens yet
            codes = [-signal.Signals[means]]
        assert child.exitcode in codes and "Traceback" not in output, (
            f"seed {seed}, stop {made}, {means}: {output}"
        )
        made += 1
        assert not (directory / "final.pt").exists(), f"seed {seed}: done after {made} stops"
    child = fork("--resume", "latest", "--checkpoint-dir", directory)
    child.finish()
    assert child.exitcode == 0
    assert_same_run(directory, reference)


def test_stopped_a_hundred_times(fork, short_run, tmp_path, whole):
    """Moments are counted in calls of Python functions, not in seconds: the same seed stops at the same ones again."""
    with Campaign(
        "stops of three runs, 100 each, at random moments by random means, SIGKILL included"
    ) as campaign:
        for seed, mode in enumerate(MODES if whole else ["geometric"]):
            options, stops = (
                [*short_run[mode][0], "--steps", 600 if whole else 60, "--save-every", 3],
                100 if whole else 10,
            )
            child = fork(*options, "--checkpoint-dir", tmp_path / f"{mode}-reference")
            child.finish()
            assert child.exitcode == 0
            campaign.case(
                f"{mode}, seed {seed}",
                stopped_often,
                fork,
                options,
                tmp_path / f"{mode}-reference",
                tmp_path / mode,
                stops,
                seed,
            )
            campaign.cases += stops - 1


def fail(frame) -> None:
    raise RuntimeError("injected")


def poison(frame) -> None:
    frame.f_locals["self"].module.head.weight.grad.fill_(float("nan"))


def crashes(mode: str) -> dict[str, tuple[Moment, object, str]]:
    """{what: (moment, act, the exception)}; all in the fifth step, where none of its halves has been applied yet."""
    return {
        "the data loader": (loading(4), fail, "RuntimeError"),
        "forward": (Moment("loss", 4 * ACCUM + 3), fail, "RuntimeError"),
        "backward": (Moment("backward", 4 * ACCUM + 3, file="_tensor.py"), fail, "RuntimeError"),
        "a NaN": (Moment("clip_gradients", 5), poison, "FloatingPointError"),
        "the first optimizer, before its step": (
            Moment("wrapper", 4 * (3 if mode == "geometric" else 1) + 1, file="optim/optimizer.py"),
            fail,
            "RuntimeError",
        ),
        "evaluation": (Moment("evaluate"), fail, "RuntimeError"),
    }


def crashed_and_resumed(
    fork, options, reference, directory, moment: Moment, act, exception: str
) -> None:
    """The checkpoint is the state after the fourth batch; the resumed run is the run."""
    fourth = fork(
        *options,
        "--checkpoint-dir",
        directory / "fourth",
        plan=[(batch_complete(4), frame_asks_to_leave)],
    )
    expected = t.load_checkpoint(re.search(r"checkpoint saved: (\S+)", fourth.finish())[1])
    assert expected["step"] == 4 and expected["metrics"]["counts"] == {
        "loss": 1
    }  # its evaluation is still to come
    child = fork(
        *options,
        "--checkpoint-dir",
        directory / "ck",
        plan=[(Moment("trained"), None), (moment, act)],
    )
    child.paused()
    settings = termios.tcgetattr(child.terminal.fileno())
    child.go()
    output = child.finish(settings)
    assert child.exitcode == 1
    assert "Traceback (most recent call last)" in output and f"{exception}: " in output
    assert "injected" in output or exception == "FloatingPointError"
    saved = t.load_checkpoint(re.search(r"Emergency checkpoint saved: (\S+)", output)[1])
    assert saved["exit_reason"] == f"exception_{exception}"
    same = [
        key for key in STATE_KEYS if key not in ("best", "evaluation")
    ]  # the fourth step's, unless it failed
    assert_same({key: saved[key] for key in same}, {key: expected[key] for key in same})
    child = fork("--resume", "latest", "--checkpoint-dir", directory / "ck")
    child.finish()
    assert child.exitcode == 0
    assert_same_run(directory / "ck", reference)


def crashed_between_the_halves(fork, options, reference, directory, moment: Moment) -> None:
    """Nothing half-updated is saved; the newest whole checkpoint is named."""
    child = fork(*options, "--checkpoint-dir", directory, plan=[(moment, fail)])
    output = child.finish()
    assert child.exitcode == 1 and "RuntimeError: injected" in output
    assert (
        f"Newest whole checkpoint: {directory}/step_4.pt" in output
        and "nothing half-updated is saved" in output
    )
    assert not (directory / "emergency_exit").exists()
    child = fork("--resume", "latest", "--checkpoint-dir", directory)
    assert "Resumed at step 4" in child.finish() and child.exitcode == 0
    assert_same_run(directory, reference)


def worker_killed(fork, options, reference, directory) -> None:
    """As the kernel does it where memory is short."""
    temporary = directory.with_name("tmp")  # short: workers have sockets there
    temporary.mkdir(parents=True, exist_ok=True)
    child = fork(
        *options,
        "--checkpoint-dir",
        directory,
        "--workers",
        1,
        plan=[(Moment("forward_backward", 2), None)],
        TMPDIR=str(temporary),
    )
    child.paused()
    worker = int(Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text())
    os.kill(worker, signal.SIGKILL)
    child.go()
    output = child.finish()
    # PyTorch says "DataLoader worker ... is killed", or that the connection over which it sent a batch has gone.
    assert (
        child.exitcode == 1
        and "Traceback (most recent call last)" in output
        and "dataloader.py" in output
    ), output
    saved = t.load_checkpoint(re.search(r"Emergency checkpoint saved: (\S+)", output)[1])
    assert saved["exit_reason"] in (
        "exception_RuntimeError",
        "exception_ConnectionResetError",
        "exception_FileNotFoundError",
        "exception_ConnectionRefusedError",
        "exception_EOFError",
    )
    assert processes_in_session(child.pid) == [] and not list(temporary.iterdir())
    child = fork("--resume", "latest", "--checkpoint-dir", directory)
    child.finish()
    assert child.exitcode == 0
    assert_same_run(directory, reference)


def test_crashes(fork, short_run, tmp_path, whole):
    with Campaign(
        "exceptions and NaN in every part of a step, killed workers; then resumed"
    ) as campaign:
        for mode in MODES if whole else ["geometric"]:
            options, reference = short_run[mode]
            for what in crashes(mode):
                campaign.case(
                    f"{mode}: {what}",
                    crashed_and_resumed,
                    fork,
                    options,
                    reference,
                    tmp_path / mode / what.replace(" ", "-"),
                    *crashes(mode)[what],
                )
            halves = [
                Moment("step", 5, file="adam.py"),
                Moment("step", (3 if mode == "geometric" else 1) * 5 + 1, file="lr_scheduler.py"),
            ]
            if mode == "geometric":
                halves += [muon_step(5), Moment("step", 10, file="adam.py")]
                halves[0] = Moment("step", 9, file="adam.py")
            for number, moment in enumerate(halves):
                campaign.case(
                    f"{mode}: half {number}",
                    crashed_between_the_halves,
                    fork,
                    options,
                    reference,
                    tmp_path / f"{mode}-{number}",
                    moment,
                )
            campaign.case(
                f"{mode}: worker",
                worker_killed,
                fork,
                options,
                reference,
                tmp_path / f"{mode}-worker",
            )


def typed_q(fork, options, directory, temporary, number: int) -> None:
    workers = 2 if number % 10 == 1 else 0
    child = fork(
        *options,
        "--steps",
        10**6,
        "--save-every",
        5,
        "--checkpoint-dir",
        directory,
        "--workers",
        workers,
        plan=[(AT_EXIT, None)],
        TMPDIR=str(temporary),
    )
    child.terminal.expect("step [0-9]+/")
    settings = termios.tcgetattr(child.terminal.fileno())
    child.terminal.send("q\n")
    child.paused()
    # The kernel may take longer than join(). Of torch's loader a thread and some pipes for each worker end with the process.
    wait_until(lambda: len(os.listdir(f"/proc/{child.pid}/task")) <= 1 + workers)
    assert Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text() == "", (
        "a process is left"
    )
    files = [
        os.readlink(f"/proc/{child.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{child.pid}/fd")
    ]
    # the terminal, the lock, and this test's two pipes
    names = sorted(re.sub(r"pts/[0-9]+|[0-9]+", "N", Path(file).name) for file in files)
    assert workers or names == ["N"] * 3 + ["pipe:[N]"] * 2 + ["run.lock"], files
    child.go()
    output = child.finish(settings)
    assert child.exitcode == 0, output
    assert (
        t.load_checkpoint(re.search(r"checkpoint saved: (\S+)", output)[1])["exit_reason"]
        == MEANS["q"][1]
    )
    assert processes_in_session(child.pid) == []
    assert not list(directory.rglob(".*")) and not list(temporary.iterdir())


def typed_q_early(fork, options, directory, temporary, number: int) -> None:
    """As early as can be: before training there is nothing to save."""
    child = fork(
        *options,
        "--steps",
        10**6,
        "--checkpoint-dir",
        directory,
        "--workers",
        number % 2,
        TMPDIR=str(temporary),
    )
    settings = termios.tcgetattr(child.terminal.fileno())
    child.terminal.send("q\n")
    output = child.finish(settings)
    assert child.exitcode == 0 and (
        "there is nothing to save" in output or "Graceful exit completed" in output
    ), output
    assert processes_in_session(child.pid) == []
    assert not list(directory.rglob(".*")) and not list(temporary.iterdir())


def test_q_a_thousand_times(fork, short_run, tmp_path, whole):
    """Every one ends within the minute that finish() waits."""
    with Campaign(
        "q typed; exit code 0, whole checkpoint, no thread, descriptor, process or file left"
    ) as campaign:
        temporary = tmp_path / "t"  # workers' sockets need a short path
        temporary.mkdir()
        for number in range(1000 if whole else 20):
            mode = list(MODES)[number % 3]
            campaign.case(
                f"{mode} {number}",
                typed_q if number % 5 else typed_q_early,
                fork,
                short_run[mode][0],
                tmp_path / "ck",
                temporary,
                number,
            )
            shutil.rmtree(
                tmp_path / "ck", ignore_errors=True
            )  # a case that failed may have made none
