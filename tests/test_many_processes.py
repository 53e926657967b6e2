"""Many processes train one model: the same batches on any number of them, one departure for all, the same run after it.

Most groups are forks of this process, each a rank with a terminal of its own; what torchrun itself does is tested with it.
"""

import os
import re
import signal
import sys
import time

import pytest
import torch
from helpers import (
    ENDLESS,
    MODES,
    OPTIONS,
    ROOT,
    SCRIPT,
    STATE_KEYS,
    STEPS,
    Images,
    Moment,
    Residual,
    alive,
    assert_close_run,
    assert_same,
    assert_same_run,
    by_script,
    classify,
    cnn,
    fail,
    final,
    finish,
    finished,
    metrics_without_times,
    program,
    saved_path,
    torchrun,
    train_gan,
    wait_until,
    worker_pids,
)
from torch import nn
from torch.nn import functional as F

import train_graceful as t


def send(signum: int):
    """For a plan: this rank, and no other, gets the signal."""
    return lambda frame: os.kill(os.getpid(), signum)


def leaves_after(batches: int) -> list:
    """A plan: SIGTERM after so many batches, and the monitor has heard it before the next."""

    def ask(frame) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        while not frame.f_locals["self"].monitor.heard:
            pass

    return [(Moment("_complete", batches, event="return"), ask)]


# ---- the same batches


@pytest.mark.parametrize("validated", [8, 13, 16])
def test_the_processes_share_out_the_samples_of_each_batch(validated):
    training, validation = torch.arange(43).unsqueeze(1), torch.arange(validated).unsqueeze(1)
    of = training, validation, torch.stack, 8, 0, validated
    whole_batches = t.Batches(*of, 0, 1)
    for size in (2, 4):
        ranks = [t.Batches(*of, rank, size) for rank in range(size)]
        for step in (0, 4, 7):
            key = "training", step
            shares, (batch, _) = [share[key][0] for share in ranks], whole_batches[key]
            assert torch.stack(shares, dim=1).flatten(0, 1).equal(batch)
            for part in range(2):  # and of each forward pass, with --grad-accum 2
                together = torch.cat([share.chunk(2)[part] for share in shares])
                assert sorted(together.tolist()) == sorted(batch.chunk(2)[part].tolist())
        seen = []
        for number in range(whole_batches.per_evaluation):
            for share in ranks:
                samples, count = share["validation", number]
                assert len(samples) == max(1, count)  # each rank makes as many forward passes
                seen += samples[:count].flatten().tolist()
        assert sorted(seen) == list(range(validated))


@pytest.mark.parametrize(
    "mode", [pytest.param("standard", marks=pytest.mark.campaign), "geometric"]
)
def test_one_two_and_four_processes_train_the_same_model(
    group, float32_muon, forty_windows, tmp_path, mode
):
    for size in (1, 2, 4):
        directory = tmp_path / str(size)
        ranks = group(
            size, *OPTIONS, *MODES[mode], "--data", forty_windows, "--checkpoint-dir", directory
        )
        texts, codes = finished(ranks)
        assert codes == [0] * size and "All steps done" in texts[0], texts
        assert texts[1:] == [""] * (size - 1)
        assert {path.name for path in directory.iterdir()} == {
            "best.pt",
            "final.pt",
            "metrics.csv",
            "run.lock",
            "step_3.pt",
            "step_6.pt",
        }
    assert_close_run(tmp_path / "2", tmp_path / "1")
    assert_close_run(tmp_path / "4", tmp_path / "1")
    assert final(tmp_path / "4").keys() == final(tmp_path / "1").keys()  # one format


def test_a_gan_in_one_module_is_trained_by_its_two_optimizers_on_any_number_of_ranks(
    group, tmp_path
):
    """They step in turn, and each of the two backward passes leaves half of the parameters out."""
    for size in (1, 2, 4):
        ranks = group(size, "--checkpoint-dir", tmp_path / str(size), program=program(train_gan))
        texts, codes = finished(ranks)
        assert codes == [0] * size and "All steps done" in texts[0], texts
    assert_close_run(tmp_path / "2", tmp_path / "1")
    assert_close_run(tmp_path / "4", tmp_path / "1")


def test_an_evaluation_has_rank_0s_buffers_and_each_rank_makes_as_many_passes(group, tmp_path):
    """With 13 samples in batches of 8 two of four ranks have none of their own in the last one."""

    def train(run: t.Run) -> None:
        run.data(Images(43, True), Images(13, False))
        model = run.model(cnn())
        optimizer = run.keep(optimizer=torch.optim.SGD(model.parameters(), run.options.lr))

        def evaluate(batch):
            images, labels = batch
            assert not model.training and not any(one.training for one in model.modules())
            with open(tmp_path / f"passes_of_{run.rank}", "a") as file:
                file.write(f"{run.step}\n")
            return {"loss": F.cross_entropy(model(images), labels, reduction="none")}

        for images, labels in run.batches(evaluate):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(loss=loss)

    ranks = group(4, "--checkpoint-dir", tmp_path / "ck", program=program(train))
    texts, codes = finished(ranks)
    assert codes == [0] * 4, texts
    passes = [(tmp_path / f"passes_of_{rank}").read_text().split() for rank in range(4)]
    assert passes[0].count("4") == passes[0].count("8") == 2 and passes == [passes[0]] * 4
    state, model, data = final(tmp_path / "ck"), cnn().eval(), Images(13, False)
    model.load_state_dict(state["model_state_dict"])
    with torch.no_grad():
        loss = F.cross_entropy(model(data.images), data.labels).item()
    assert state["evaluation"]["step"] == 8
    assert state["evaluation"]["values"]["loss"] == pytest.approx(loss, rel=1e-5)


def test_each_rank_may_log_what_it_likes_and_the_rows_have_the_means(group, tmp_path):
    """Many people log on rank 0 alone. Rows come every four batches, and a stop between them loses nothing."""

    def train(run: t.Run) -> None:
        run.data(Images(43, False))
        model = run.model(Residual())
        optimizer = run.keep(optimizer=torch.optim.SGD(model.parameters(), run.options.lr))
        for images, labels in run.batches():
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            if run.rank == 0:
                run.log(loss=1.0, alone=run.step)
            run.log(each=10.0 * run.rank + run.step)
            for number in range(40 if run.rank == 1 else 0):
                run.log(**{f"of_one_{number}": number})

    words, settings = ["--log-every", 4, "--checkpoint-dir", tmp_path], {"program": program(train)}
    texts, codes = finished(group(2, *words, **settings, plans={1: leaves_after(1)}))
    assert codes == [143, 143] and t.load_checkpoint(saved_path(texts[0]))["step"] < 4, texts
    texts, codes = finished(group(2, "--resume", "latest", *words, **settings))
    assert codes == [0, 0], texts
    rows = metrics_without_times(tmp_path)
    assert [row["step"] for row in rows] == ["4", "8"]
    for row, mean in zip(rows, (1.5, 5.5)):
        assert (
            float(row["loss"]) == 1.0
            and float(row["alone"]) == mean
            and float(row["each"]) == 5.0 + mean
        )
        assert float(row["of_one_39"]) == 39.0


# ---- one departure for all


def writes_where_it_leaves(folder):
    def train(run: t.Run) -> None:
        run.data(Images(43, False))
        model = run.model(Residual())
        optimizer = run.keep(optimizer=torch.optim.SGD(model.parameters(), run.options.lr))
        try:
            for images, labels in run.batches():
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
        finally:
            (folder / f"{run.rank} left").write_text(str(run.step))

    return train


@pytest.mark.parametrize("number, signum", list(enumerate(t.EXIT_SIGNALS)))
def test_all_leave_at_the_same_step_whichever_rank_gets_the_signal(group, tmp_path, number, signum):
    ranks = group(
        3,
        *ENDLESS,
        "--batch-size",
        9,
        "--checkpoint-dir",
        tmp_path / "ck",
        program=program(writes_where_it_leaves(tmp_path)),
    )
    ranks[0].terminal.expect(r"step \d+/")
    ranks[number % 3].kill(signum)
    texts, codes = finished(ranks)
    assert codes == [128 + signum] * 3 and texts[0].count("Exit requested!") == 1, texts
    state = t.load_checkpoint(saved_path(texts[0]))
    assert state["exit_reason"] == f"signal_{signum.name}"
    assert [(tmp_path / f"{rank} left").read_text() for rank in range(3)] == [
        str(state["step"])
    ] * 3
    assert f"Completed Steps: {state['step']}" in texts[0] and texts[1:] == ["", ""]


@pytest.mark.parametrize(
    "rank, means, code", [(0, "q", 0), (0, signal.SIGTERM, 143), (1, signal.SIGUSR1, 138)]
)
def test_a_request_to_one_rank_before_the_loop_is_one_to_all(group, tmp_path, rank, means, code):
    def train(run: t.Run) -> None:
        (tmp_path / f"begun {run.rank}").touch()
        while not (tmp_path / "go").exists():
            time.sleep(0.01)
        writes_where_it_leaves(tmp_path)(run)

    ranks = group(2, *ENDLESS, "--checkpoint-dir", tmp_path / "ck", program=program(train))
    wait_until(lambda: (tmp_path / "begun 0").exists() and (tmp_path / "begun 1").exists())
    if means == "q":
        ranks[rank].terminal.send("q\n")
        ranks[rank].terminal.expect("Exit requested!")
    else:
        ranks[rank].kill(means)
    (tmp_path / "go").touch()
    texts, codes = finished(ranks)
    assert (
        codes == [code, code]
        and "Graceful exit completed" in texts[0]
        and "Traceback" not in texts[1]
    ), texts
    step = t.load_checkpoint(saved_path(texts[0]))["step"]
    assert step == 0 or means != "q"
    assert [(tmp_path / f"{rank} left").read_text() for rank in range(2)] == [str(step)] * 2


def test_q_typed_while_torchruns_processes_still_start(spawn, forty_windows, tmp_path):
    """Nobody is left waiting for a rank that has gone."""
    child = torchrun(
        spawn, SCRIPT, *OPTIONS, *ENDLESS, "--data", forty_windows, "--checkpoint-dir", tmp_path
    )
    child.send("q\n")
    text = finish(child)
    assert (
        child.exitstatus == 0 and "Graceful exit completed" in text and "Traceback" not in text
    ), text
    # It may come in the first batch.
    assert t.load_checkpoint(saved_path(text))["step"] <= 1


def test_q_typed_for_rank_0_and_s_before_it(group, forty_windows, tmp_path):
    ranks = group(2, *OPTIONS, *ENDLESS, "--data", forty_windows, "--checkpoint-dir", tmp_path)
    ranks[0].terminal.expect(r"step \d+/")
    ranks[0].terminal.send("s\n")
    ranks[0].terminal.expect("Checkpoint saved: ")
    ranks[0].terminal.send("q\n")
    texts, codes = finished(ranks)
    assert codes == [0, 0] and "Graceful exit completed" in texts[0] and not texts[1]
    assert t.load_checkpoint(saved_path(texts[0]))["exit_reason"] == "user_requested_graceful_exit"
    assert len(list(tmp_path.glob("step_*.pt"))) == 1


def test_torchruns_only_process_leaves_a_loader_that_hangs(group, tmp_path):
    class Hangs(Images):
        read = 0

        def __getitem__(self, index: int):
            self.read += 1
            while self.read == 30:  # of its fourth batch
                (tmp_path / "hangs").touch()
            return super().__getitem__(index)

    def train(run: t.Run) -> None:
        run.data(Hangs(43, False))
        model = run.model(Residual())
        optimizer = run.keep(optimizer=torch.optim.SGD(model.parameters(), run.options.lr))
        for images, _ in run.batches():
            optimizer.zero_grad()
            model(images).sum().backward()
            optimizer.step()

    (rank,) = group(1, "--checkpoint-dir", tmp_path, program=program(train))
    wait_until((tmp_path / "hangs").exists)
    rank.terminal.send("q\n")
    text = rank.finish()
    assert rank.exitcode == 0 and "Graceful exit completed" in text
    assert t.load_checkpoint(saved_path(text))["step"] == 3


# ---- the same run after it


@pytest.mark.parametrize(
    "mode, size",
    [
        ("standard", 2),
        ("geometric", 2),
        *(
            pytest.param(*case, marks=pytest.mark.campaign)
            for case in [("controller", 2), ("geometric", 4)]
        ),
    ],
)
def test_stopped_by_any_rank_and_resumed_is_the_same_run(
    group, forty_windows, tmp_path, mode, size
):
    options = [*OPTIONS, *MODES[mode], "--dropout", 0.1, "--data", forty_windows]
    finished(group(size, *options, "--checkpoint-dir", tmp_path / "whole"))
    directory, arguments = tmp_path / "stopped", options
    for rank, signum, moment in [
        (size - 1, signal.SIGTERM, Moment("forward_backward", 3)),
        (0, signal.SIGUSR1, Moment("evaluate")),
    ]:
        plans = {rank: [(moment, send(signum))]}
        texts, codes = finished(group(size, *arguments, "--checkpoint-dir", directory, plans=plans))
        assert codes == [128 + signum] * size and texts[0].count("Exit requested") == 1, texts
        state = t.load_checkpoint(saved_path(texts[0]))
        assert state["exit_reason"] == f"signal_{signum.name}" and 1 <= state["step"] < STEPS
        arguments = ["--resume", "latest"]
    texts, codes = finished(group(size, *arguments, "--checkpoint-dir", directory))
    assert codes == [0] * size, texts
    assert_same_run(directory, tmp_path / "whole")


def stopped_twice_and_resumed(group, size: int, folder, *options: object, **settings) -> None:
    """On the same number of ranks, after about a third of its steps and two thirds."""
    texts, codes = finished(group(size, *options, "--checkpoint-dir", folder / "whole", **settings))
    assert codes == [0] * size, texts
    steps = []
    for stopped in (size - 1, 0):
        words = ["--resume", "latest"] if steps else options
        texts, codes = finished(
            group(
                size,
                *words,
                "--checkpoint-dir",
                folder / "stopped",
                plans={stopped: leaves_after(1)},
                **settings,
            )
        )
        assert codes == [143] * size, texts
        steps.append(t.load_checkpoint(saved_path(texts[0]))["step"])
    assert 1 <= steps[0] < steps[1] < STEPS
    texts, codes = finished(
        group(size, "--resume", "latest", "--checkpoint-dir", folder / "stopped", **settings)
    )
    assert codes == [0] * size, texts
    assert_same_run(folder / "stopped", folder / "whole")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cnn_with_batchnorm_dropout_and_augmentation_resumes_bit_for_bit(
    group, tmp_path, workers
):
    stopped_twice_and_resumed(
        group, 2, tmp_path, "--workers", workers, program=program(classify(cnn))
    )


def test_four_ranks_with_several_buckets_of_gradients_resume_bit_for_bit(group, tmp_path):
    """The order in which four numbers are added up depends on which bucket of DDP's they are in, and where."""

    def wide() -> nn.Module:
        return Residual(width=640, layers=4)  # 7 MB; a bucket of 1 MiB, then 25

    assert 4 * sum(parameter.numel() for parameter in wide().parameters()) > 5 * 2**20
    stopped_twice_and_resumed(group, 4, tmp_path, program=program(classify(wide)))


def test_a_gan_in_one_module_resumes_bit_for_bit(group, tmp_path):
    stopped_twice_and_resumed(group, 2, tmp_path, program=program(train_gan))


def test_a_run_goes_on_with_any_number_of_processes(group, float32_muon, forty_windows, tmp_path):
    arguments = [*OPTIONS, *MODES["geometric"], "--data", forty_windows, "--steps", 16]
    finished(group(1, *arguments, "--checkpoint-dir", tmp_path / "whole"))
    steps = []
    for size in (1, 2, 4, 1):
        plans = {} if size == 1 and steps else {0: leaves_after(1)}
        texts, codes = finished(
            group(size, *arguments, "--checkpoint-dir", tmp_path / "moved", plans=plans)
        )
        assert codes == [143 if plans else 0] * size, texts
        steps.append(t.load_checkpoint(t.latest_checkpoint(tmp_path / "moved"))["step"])
        arguments = ["--resume", "latest"]
    assert 1 <= steps[0] < steps[1] < steps[2] < steps[3] == 16
    assert_close_run(tmp_path / "moved", tmp_path / "whole")


# ---- failures


def test_an_exception_in_one_rank_ends_all_with_a_checkpoint(group, forty_windows, tmp_path):
    options = [*OPTIONS, *MODES["standard"], "--data", forty_windows]
    finished(group(2, *options, "--checkpoint-dir", tmp_path / "whole"))
    plans = {1: [(Moment("forward_backward", 3), fail)]}
    texts, codes = finished(group(2, *options, "--checkpoint-dir", tmp_path / "ck", plans=plans))
    assert codes == [1, 1] and "RuntimeError: injected" in texts[1], texts
    state = t.load_checkpoint(saved_path(texts[0]))
    assert state["exit_reason"] == "exception_RuntimeError" and state["step"] == 2
    texts, codes = finished(group(2, "--resume", "latest", "--checkpoint-dir", tmp_path / "ck"))
    assert codes == [0, 0] and "Resumed at step 2 of" in texts[0], texts
    assert_same_run(tmp_path / "ck", tmp_path / "whole")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_batch_that_fails_on_one_rank_is_saved_as_it_was_or_as_rank_0_has_completed_it(
    group, tmp_path, rank
):
    """BatchNorm has counted it by the time; on rank 0 that is undone. Resumed, it is the same run."""
    train = program(classify(cnn))
    finished(group(2, "--checkpoint-dir", tmp_path / "whole", program=train))
    plans = {rank: [(Moment("clip_gradients", 3), fail)]}
    texts, codes = finished(
        group(2, "--checkpoint-dir", tmp_path / "ck", plans=plans, program=train)
    )
    assert codes == [1, 1] and "RuntimeError: injected" in texts[rank], texts
    assert t.load_checkpoint(saved_path(texts[0]))["step"] == (2 if rank == 0 else 3)
    texts, codes = finished(
        group(2, "--resume", "latest", "--checkpoint-dir", tmp_path / "ck", program=train)
    )
    assert codes == [0, 0], texts
    # Of the row that rank 1 has no part in any more, only the mean is another.
    a, b = final(tmp_path / "ck"), final(tmp_path / "whole")
    assert_same({key: a[key] for key in STATE_KEYS}, {key: b[key] for key in STATE_KEYS})


def test_an_exception_after_rank_0_has_stepped_saves_nothing_half_updated(group, tmp_path):
    plans = {0: [(Moment("log", 5), fail)]}  # the last line of the loop's body
    texts, codes = finished(
        group(2, "--checkpoint-dir", tmp_path, plans=plans, program=program(classify(cnn)))
    )
    assert codes == [1, 1] and "RuntimeError: injected" in texts[0], texts
    assert (
        "nothing half-updated is saved" in texts[0] and not (tmp_path / "emergency_exit").exists()
    )
    assert "Graceful exit completed" not in texts[0]
    assert re.search(r"Newest whole checkpoint: \S+/(step_3|best).pt\r\n", texts[0]), texts


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_dies_outright_is_noticed(group, forty_windows, tmp_path, killed):
    ranks = group(2, *OPTIONS, *ENDLESS, "--data", forty_windows, "--checkpoint-dir", tmp_path)
    ranks[0].terminal.expect(r"step \d+/")
    ranks[killed].kill(signal.SIGKILL)
    texts, codes = finished(ranks)
    assert codes[killed] == -9 and codes[1 - killed] == 1
    if killed == 1:
        assert t.load_checkpoint(saved_path(texts[0]))["exit_reason"].startswith("exception_")
    assert not list(tmp_path.rglob(".*.tmp"))


def test_a_stopped_rank_holds_the_others_up_and_nothing_more(group, forty_windows, tmp_path, whole):
    ranks = group(2, *OPTIONS, *ENDLESS, "--data", forty_windows, "--checkpoint-dir", tmp_path)
    ranks[0].terminal.expect(r"step \d+/")
    ranks[1].kill(signal.SIGSTOP)
    ranks[0].kill(signal.SIGTERM)
    ranks[0].terminal.expect("Exit requested")
    time.sleep(20 if whole else 0)  # is not the others' end
    ranks[1].kill(signal.SIGCONT)
    texts, codes = finished(ranks)
    assert codes == [143, 143] and "Emergency checkpoint saved" in texts[0]


def test_a_save_that_fails_on_rank_0_keeps_all_training(group, forty_windows, tmp_path):
    ranks = group(2, *OPTIONS, *ENDLESS, "--data", forty_windows, "--checkpoint-dir", tmp_path)
    ranks[0].terminal.expect(r"step \d+/")
    (tmp_path / "emergency_exit").write_text("in the way")
    ranks[0].terminal.send("q\n")
    ranks[0].terminal.expect("not saved: .*Training goes on")
    ranks[0].terminal.expect(r"step \d+/")
    (tmp_path / "emergency_exit").unlink()
    ranks[0].terminal.send("q\n")
    texts, codes = finished(ranks)
    assert codes == [0, 0] and "Emergency checkpoint saved" in texts[0]


def test_a_mistake_is_one_line_and_exit_code_2_of_each(group, forty_windows, tmp_path):
    holder = group(1, *OPTIONS, *ENDLESS, "--data", forty_windows, "--checkpoint-dir", tmp_path)
    holder[0].terminal.expect(r"step \d+/")
    for arguments, message in [
        (["--data", forty_windows, "--checkpoint-dir", tmp_path], "in use by another run"),
        (
            ["--data", forty_windows, "--batch-size", 5, "--grad-accum", 1],
            "is no multiple of 2 processes",
        ),
        (["--data", tmp_path / "none"], "No such file"),
        (["--resume", "latest", "--checkpoint-dir", tmp_path / "ck"], "no checkpoint there"),
        (["--batch-siez", 4], "batch-siez"),
    ]:
        texts, codes = finished(group(2, *OPTIONS, *arguments))
        assert codes == [2, 2]
        for text in texts:  # each says what it has found itself
            assert text.count("\n") == 1 and message in text, texts
            assert "\rerror: " in "\r" + text  # no status line is left before it


# ---- torchrun itself


def test_q_and_enter_in_torchruns_terminal(spawn, forty_windows, tmp_path):
    child = torchrun(
        spawn, SCRIPT, *OPTIONS, *ENDLESS, "--data", forty_windows, "--checkpoint-dir", tmp_path
    )
    child.expect(r"step \d+/")
    workers = worker_pids(child.pid)
    child.send("q\n")
    text = finish(child)
    assert child.exitstatus == 0 and "Graceful exit completed" in text
    command = rf"-m torch.distributed.run --nproc-per-node=2 {SCRIPT} --resume /"
    assert command in text.partition("Resume with: ")[2], text
    assert len(workers) == 2 and not any(map(alive, workers))


def test_ctrl_c_in_torchruns_terminal_counts_once_and_the_summary_stands_last(
    spawn, forty_windows, tmp_path
):
    child = by_script(
        spawn, 2, *OPTIONS, *ENDLESS, "--data", forty_windows, "--checkpoint-dir", tmp_path
    )
    child.expect(r"step \d+/")
    workers = worker_pids(child.pid)
    child.sendintr()
    text = finish(child)
    assert (
        child.exitstatus == 130
        and "Emergency checkpoint saved" in text
        and "Second Ctrl-C" not in text
    )
    assert "Traceback" not in text
    assert re.search(r"Resume with: \S*scripts/train_torchrun.sh 2 --resume /", text), text
    assert t.load_checkpoint(saved_path(text))["exit_reason"] == "signal_SIGINT"
    assert not any(map(alive, workers))


def test_a_hangup_that_nohup_has_ignored_is_ignored_by_torchrun_too(spawn, forty_windows, tmp_path):
    """torchrun itself hears it all the same, and passes it on."""
    options = [*OPTIONS, *ENDLESS, "--data", forty_windows, "--checkpoint-dir", tmp_path]
    child = by_script(
        spawn, 2, *options, enter=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    child.expect(r"step \d+/")
    for pid in (child.pid, *worker_pids(child.pid)):
        os.kill(pid, signal.SIGHUP)
    for _ in range(5):
        child.expect(r"step \d+/")
    child.send("q\n")
    assert "signal" not in finish(child) and child.exitstatus == 0


def test_nothing_stands_between_the_lines_of_a_run_under_torchrun(spawn, forty_windows, tmp_path):
    """No warning of PyTorch's, DDP's about parameters that are always used among them: all of it started for real."""
    environment = {**os.environ, "PYTHON": sys.executable}
    # The script sets them itself.
    del environment["TORCH_CPP_LOG_LEVEL"], environment["LOGLEVEL"]
    words = [
        ROOT / "scripts" / "train_torchrun.sh",
        2,
        *OPTIONS,
        "--data",
        forty_windows,
        "--checkpoint-dir",
        tmp_path,
    ]
    child = spawn(command=[str(word) for word in words], env=environment)
    text = finish(child)
    assert child.exitstatus == 0 and "Warning" not in text and "[W" not in text, text


def test_a_mistake_is_not_buried_by_torchrun(spawn):
    child = by_script(spawn, 2, "--stps", 5)
    lines = finish(child).splitlines()
    assert (
        child.exitstatus == 2
        and "error: unrecognized arguments: --stps 5 (--help lists the options)" in lines
    )
    assert (
        len(lines) <= 4
    )  # one of each, beside them what torchrun says of the process that failed first, and of the other


SECOND_ALONE = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train_graceful as tg

def train(run):
    if os.environ["RANK"] == "1":
        raise tg.UserError("the second disk is not there")

tg.main(train)
"""


def test_a_mistake_that_the_second_process_makes_alone_is_said(spawn, tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(SECOND_ALONE)
    child = torchrun(spawn, script, "--checkpoint-dir", tmp_path)
    text = finish(child)
    assert (
        child.exitstatus == 1
        and text.count("error: the second disk is not there") == 1
        and "exitcode  : 2" in text
    )


def test_a_job_in_the_background_leaves_the_keyboard_to_the_shell(spawn, forty_windows, tmp_path):
    environment = {**os.environ, "PS1": "$ ", "PYTHON": sys.executable}
    shell = spawn(command=["bash", "--norc", "--noprofile", "-i"], env=environment)
    words = [ROOT / "scripts" / "train_torchrun.sh", 2, *OPTIONS, *ENDLESS]
    words += ["--data", forty_windows, "--checkpoint-dir", tmp_path]
    shell.sendline(" ".join(map(str, words)) + " &")
    shell.expect(r"step \d+/")
    for number in range(5):
        shell.sendline(f"echo sum $(({number} + 100))")
        shell.expect(f"sum {number + 100}")
    shell.sendline("fg")
    # What the job prints in the background looks the same; Ctrl-C would take the line "fg" from bash.
    wait_until(lambda: os.tcgetpgrp(shell.child_fd) != shell.pid)
    shell.expect(r"step \d+/")
    shell.sendintr()
    shell.expect("Graceful exit completed")
    shell.sendline("exit")
    finish(shell)


def test_torchrun_killed_outright_leaves_no_worker(spawn, forty_windows, tmp_path):
    child = torchrun(
        spawn, SCRIPT, *OPTIONS, *ENDLESS, "--data", forty_windows, "--checkpoint-dir", tmp_path
    )
    child.expect(r"step \d+/")
    workers = worker_pids(child.pid)
    os.kill(child.pid, signal.SIGKILL)
    wait_until(lambda: not any(map(alive, workers)))
    assert t.latest_checkpoint(tmp_path)
