"""Many processes train one model: the same batches, one departure for all, the same run after it.

With --shard, where each has a part of the model, too; what is peculiar to that: test_sharded.
Most groups are forks of this process, each a rank with a terminal of its own.
"""

import os
import re
import signal
import sys

import helpers as h
import pytest
import torch
from torch.nn import functional as F

import train_graceful as t


def sigterm(frame) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


LEAVES = [(h.Moment("complete", event="return"), h.frame_asks_to_leave)]


def by_sgd(in_batch=lambda run: None):
    """A train(run) that calls in_batch(run) in each batch, and prints where it has left."""

    def train(run: t.Run) -> None:
        run.data(h.Rows(43))
        model = run.model(h.Residual())
        optimizer = h.sgd(run, model)
        try:
            for batch in run.batches():
                h.update(run, model, optimizer, batch)
                in_batch(run)
        finally:
            print("left at", run.step)

    return h.program(train)


@pytest.fixture
def of(forty_windows):
    """of("mlp --shard"): the options of a run, and its program if it is not the built-in one."""
    own = {"halves": h.train_halves, "mlp": h.classify(h.mlp), "workers": h.classify(h.mlp)}
    # Gradients in a bucket of 1 MiB and others of 25: the order of sums depends on it.
    own["wide"] = h.classify(lambda: h.Residual(width=640, layers=4))

    def of(model: str) -> tuple[list, dict]:
        name, *way = model.split()
        if name in own:
            return ["--workers", int(name == "workers"), *way], {"program": h.program(own[name])}
        return [*h.OPTIONS, *h.MODES[name], "--data", forty_windows, *way], {}

    return of


@pytest.fixture
def endless(forty_windows, tmp_path) -> list:
    """Options of the built-in program that trains in tmp_path until it is asked to leave."""
    return [*h.OPTIONS, *h.ENDLESS, "--data", forty_windows, "--checkpoint-dir", tmp_path]


# ---- the same batches


@pytest.mark.parametrize("model", ["geometric", "geometric --shard", "halves"])
def test_one_two_and_four_processes_train_the_same_model(ended, of, float32_muon, tmp_path, model):
    """Of halves two optimizers step in turn, and each backward pass leaves one out, as a GAN's."""
    options, own = of(model)
    one = tmp_path / "1"
    for size in (1, 2, 4):
        folder = tmp_path / str(size)
        texts = ended(folder.name, size, *options, **own)
        assert "All steps done" in texts[0] and not any(texts[1:]), texts
        assert model == "halves" or size == 1 or f" parameters, on {size} x cpu: " in texts[0]
        names = {path.name for path in folder.iterdir()} - {"best.pt"}
        assert names == {"final.pt", "metrics.csv", "run.lock", "step_3.pt", "step_6.pt"}
        h.assert_close_run(folder, one)
        assert list(h.final(folder)) == list(h.final(one))


def test_an_evaluation_is_over_each_sample_once_with_rank_0s_buffers(ended, of, tmp_path):
    """With 13 samples in batches of 8 two of four ranks have none of their own in the last one."""
    options, own = of("mlp")
    ended("ck", 4, *options, **own)
    state, model, data = h.final(tmp_path / "ck"), h.mlp().eval(), h.Rows(13)
    model.load_state_dict(state["model_state_dict"])
    with torch.no_grad():
        loss = F.cross_entropy(model(data.rows), (data.rows.sum(1) > 0).long()).item()
    assert state["evaluation"]["step"] == h.STEPS
    assert state["evaluation"]["values"]["loss"] == pytest.approx(loss, rel=1e-5)


def test_each_rank_may_log_what_it_likes_and_the_rows_have_the_means(ended, tmp_path):
    """Rows come every four batches, and a stop between them loses nothing."""

    def log(run: t.Run) -> None:
        if run.rank == 1:
            run.log(loss=1.0, alone=run.step)
        run.log(each=10.0 * run.rank + run.step)

    options, own = ["--log-every", 4], {"program": by_sgd(log)}
    texts = ended("ck", 2, *options, code=143, plans={1: LEAVES}, **own)
    assert t.load_checkpoint(h.saved_path(texts[0]))["step"] < 4
    ended("ck", 2, "--resume", "latest", *options, **own)
    rows = {"step": [4, 8], "loss": [1, 1], "alone": [1.5, 5.5], "each": [6.5, 10.5]}
    assert {name: h.column(tmp_path / "ck", name) for name in rows} == rows


# ---- one departure for all

BEFORE_THE_LOOP = [(True, 0, "q"), (True, 0, signal.SIGTERM), (True, 1, signal.SIGUSR1)]
IN_IT = [(False, number % 3, means) for number, means in enumerate(("q", *t.EXIT_SIGNALS))]


@pytest.mark.parametrize("before, rank, means", [*BEFORE_THE_LOOP, *IN_IT])
def test_a_request_to_one_rank_is_one_to_all_at_the_same_step(group, tmp_path, before, rank, means):
    plans = {number: [(h.Moment("data"), None)] for number in range(3 * before)}
    words = [*h.ENDLESS, "--batch-size", 9, "--checkpoint-dir", tmp_path]
    ranks = group(3, *words, plans=plans, program=by_sgd())
    if before:
        for each in ranks:
            each.paused()
    else:
        ranks[0].terminal.expect(r"step \d+/")
    if means == "q":
        ranks[rank].terminal.send("q\n")
    else:
        ranks[rank].kill(means)
    if rank == 0:
        ranks[0].terminal.expect("Exit requested!")
    for each in ranks:
        each.go()
    if rank > 0:
        ranks[0].terminal.expect("Exit requested!")
    texts, codes = h.finished(ranks)
    assert codes == [0 if means == "q" else 128 + means] * 3, texts
    state = t.load_checkpoint(h.saved_path(texts[0]))
    name = "user_requested_graceful_exit" if means == "q" else f"signal_{means.name}"
    assert state["exit_reason"] == name and (state["step"] == 0 or not (before and means == "q"))
    assert f"Completed Steps: {state['step']}" in texts[0] and "requested!" not in texts[0]
    assert all(f"left at {state['step']}\r\n" in text for text in texts), texts


# ---- the same run after it

RUNS = [("standard", 2), ("geometric", 2), ("mlp", 2), ("workers", 2), ("wide", 4), ("halves", 2)]
RUNS += [("geometric --shard", 2), ("mlp --shard", 2), ("halves --shard", 2)]


@pytest.mark.parametrize("model, size", RUNS)
def test_stopped_twice_by_any_rank_and_resumed_is_the_same_run(ended, of, tmp_path, model, size):
    """The built-in model is stopped in a batch, then in an evaluation."""
    options, own = of(model)
    plans = [LEAVES, LEAVES]
    if not own:
        options += ["--dropout", 0.1]
        plans = [[(h.Moment(name, nth), sigterm)] for name, nth in (("loss", 5), ("evaluate", 1))]
    ended("whole", size, *options, **own)
    steps = [0]
    for rank, plan in zip((size - 1, 0), plans):
        texts = ended("stopped", size, *options, code=143, plans={rank: plan}, **own)
        assert texts[0].count("Exit requested") == 1
        steps.append(t.load_checkpoint(h.saved_path(texts[0]))["step"])
        options = ["--resume", "latest"]
    # Under load the first may be heard a batch later, where the second comes.
    assert 0 < steps[1] <= steps[2] < h.STEPS
    ended("stopped", size, *options, **own)
    h.assert_same_run(tmp_path / "stopped", tmp_path / "whole")


# ---- failures


FAILURES = [("standard", 1, "loss", 5, 2), ("mlp", 0, "clip", 3, 2), ("mlp", 1, "clip", 3, 3)]
# The last line of the loop's body: the weights have changed.
FAILURES += [("mlp", 0, "log", 9, None)]
# The others' parts are out of reach.
FAILURES += [("geometric --shard", 0, "loss", 9, None), ("geometric --shard", 1, "Muon", 5, None)]


@pytest.mark.parametrize("model, rank, function, nth, saved", FAILURES)
def test_an_exception_in_one_rank_ends_all_and_resumed_it_is_the_same_run(
    ended, of, tmp_path, model, rank, function, nth, saved
):
    """Saved is what was before the batch or what rank 0 has completed, nothing half-updated."""
    options, own = of(model)
    ended("whole", 2, *options, **own)
    plans = {rank: [(h.Moment(function, nth), h.fail)]}
    texts = ended("ck", 2, *options, code=1, plans=plans, **own)
    assert "RuntimeError: injected" in texts[rank], texts
    if saved is None:
        assert "half-updated is saved" in texts[0] and "Graceful exit completed" not in texts[0]
        assert not (tmp_path / "ck" / "emergency_exit").exists()
        path = re.search(r"Newest whole checkpoint: (\S+/(step_3|best).pt)\r\n", texts[0])[1]
    else:
        path = h.saved_path(texts[0])
        state = t.load_checkpoint(path)
        assert state["exit_reason"].startswith("exception_") and state["step"] == saved
    ended("ck", 2, "--resume", path, **own)
    # Of the row that one rank has no part in any more, only the mean is another.
    h.assert_same_state(tmp_path / "ck", tmp_path / "whole")


@pytest.mark.parametrize("killed, way", [(0, "--shard"), (1, "--no-shard"), (1, "--shard")])
def test_a_rank_that_dies_outright_is_noticed(group, endless, tmp_path, killed, way):
    """Its part of the model has gone with it; what was saved before is whole."""
    ranks = group(2, *endless, way, "--save-every", 5)
    ranks[0].terminal.expect(r"step [1-9]\d+/")
    ranks[killed].kill(signal.SIGKILL)
    texts, codes = h.finished(ranks)
    assert codes[killed] == -9 and codes[1 - killed] == 1
    if killed:
        reached = "Newest whole checkpoint: " if way == "--shard" else "checkpoint saved: "
        assert reached in texts[0], texts
    assert h.whole_files(tmp_path)


def test_a_mistake_is_one_line_and_exit_code_2_of_each(group, forty_windows, tmp_path, endless):
    (holder,) = group(1, *endless)
    holder.terminal.expect(r"step \d+/")
    for arguments, message in [
        (["--checkpoint-dir", tmp_path], "in use by another run"),
        (["--batch-size", 5, "--grad-accum", 1], "is no multiple of 2 processes"),
        (["--resume", "latest", "--checkpoint-dir", tmp_path / "ck"], "no checkpoint there"),
        (["--batch-siez", 4], "batch-siez"),
    ]:
        texts, codes = h.finished(group(2, *h.OPTIONS, "--data", forty_windows, *arguments))
        assert codes == [2, 2]
        # Each says what it has found itself, and no status line is left before it.
        for text in texts:
            assert text.count("\n") == 1 and message in text and "\rerror: " in f"\r{text}"


def test_a_mistake_that_the_second_process_makes_alone_is_said(group, tmp_path):
    def train(run: t.Run) -> None:
        if run.rank == 1:
            raise t.UserError("the second disk is not there")
        run.data(h.Rows(43))
        run.model(h.Residual())

    texts, codes = h.finished(group(2, "--checkpoint-dir", tmp_path, program=h.program(train)))
    assert codes == [1, 2] and texts[1] == "error: the second disk is not there\r\n", (codes, texts)


# ---- torchrun itself


@pytest.mark.parametrize("trains", [False, True])
def test_q_in_torchruns_terminal_while_its_processes_start_or_train(spawn, endless, trains):
    """Nobody is left waiting for a rank that has gone."""
    child = h.torchrun(spawn, h.SCRIPT, *endless)
    if trains:
        child.expect(r"step \d+/")
        child.send("s\n")
        child.expect("Checkpoint saved: ")
    child.send("q\n")
    workers, text = h.worker_pids(child.pid), h.finish(child)
    assert child.exitstatus == 0 and "Graceful exit completed" in text, text
    assert "Traceback" not in text and not any(map(h.alive, workers))
    # It may come in the first batch.
    assert trains or t.load_checkpoint(h.saved_path(text))["step"] <= 1
    command = f"-m torch.distributed.run --nproc-per-node=2 {h.SCRIPT} --resume /"
    assert command in text.partition("Resume with: ")[2], text


@h.NEWER_TORCHRUN
def test_in_the_background_it_leaves_the_keyboard_to_the_shell_and_warns_of_nothing(spawn, endless):
    """All of it for real; a hangup that nohup has ignored counts not at all, Ctrl-C once."""
    environment = {**os.environ, "PS1": "$ ", "PYTHON": sys.executable}
    # The script sets them itself.
    del environment["TORCH_CPP_LOG_LEVEL"], environment["LOGLEVEL"]
    shell = spawn(command=["bash", "--norc", "--noprofile", "-i"], env=environment)
    words = ["trap '' HUP;", h.ROOT / "scripts" / "train_torchrun.sh", 2, *endless, "&"]
    shell.sendline(" ".join(map(str, words)))
    shell.expect(r"step \d+/")
    text = shell.before
    for _ in range(5):
        shell.sendline("echo pid $!")
        shell.expect(r"pid (\d+)\r")
    job = int(shell.match[1])
    workers = h.worker_pids(job)
    for pid in (job, *workers):
        os.kill(pid, signal.SIGHUP)
    shell.sendline("fg")
    # What the job prints in the background looks the same; Ctrl-C would take the line from bash.
    h.wait_until(lambda: os.tcgetpgrp(shell.child_fd) != shell.pid)
    for _ in range(5):
        shell.expect(r"step \d+/")
    shell.sendintr()
    shell.expect("Graceful exit completed")
    text += shell.before
    shell.sendline("echo code $?")
    shell.expect("code 130\r")
    text += shell.before
    assert len(workers) == 2 and not any(map(h.alive, workers))
    for unwanted in ("Second Ctrl-C", "SIGHUP", "Warning", "[W", "Traceback"):
        assert unwanted not in text, text
    assert re.search(r"Resume with: \S*scripts/train_torchrun.sh 2 --resume /", text), text
    assert t.load_checkpoint(h.saved_path(text))["exit_reason"] == "signal_SIGINT"


@h.NEWER_TORCHRUN
def test_a_mistake_is_not_buried_by_torchrun(spawn):
    child = h.by_script(spawn, 2, "--stps", 5)
    lines = h.finish(child).splitlines()
    assert child.exitstatus == 2
    assert "error: unrecognized arguments: --stps 5 (--help lists the options)" in lines
    # One of each, beside them what torchrun says of the process that failed first, and the other.
    assert len(lines) <= 4


def test_torchrun_killed_outright_leaves_no_worker(spawn, endless, tmp_path):
    child = h.torchrun(spawn, h.SCRIPT, *endless)
    child.expect(r"step \d+/")
    workers = h.worker_pids(child.pid)
    os.kill(child.pid, signal.SIGKILL)
    h.wait_until(lambda: not any(map(h.alive, workers)))
    assert h.whole_files(tmp_path / "emergency_exit")
