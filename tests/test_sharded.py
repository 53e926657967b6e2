"""--shard: every rank has a part of the model, rank 0 saves all of it; any number of ranks goes on."""

import ctypes
import errno
import os
import re
import signal
import zipfile

import pytest
import torch
from helpers import (
    ENDLESS,
    MODES,
    OPTIONS,
    SCRIPT,
    STEPS,
    Moment,
    Residual,
    alive,
    assert_close_run,
    assert_same_run,
    classify,
    cnn,
    fail,
    final,
    finish,
    finished,
    flip_a_weight,
    metrics_without_times,
    program,
    refused,
    saved_path,
    torchrun,
    train_gan,
    wait_until,
    whole_files,
    worker_pids,
)
from torch import nn

import train_graceful as t


def send_sigterm(frame) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def sharded(group):
    """sharded(size, directory, *options) starts that many ranks."""

    def start(size: int, directory, *options: object, plans: dict | None = None, **settings):
        return group(size, "--checkpoint-dir", directory, *options, plans=plans, **settings)

    return start


def new(text, mode: str = "geometric", *options: object) -> list:
    return [*OPTIONS, *MODES[mode], "--data", text, "--shard", *options]


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return tmp_path_factory.mktemp("references")


@pytest.fixture
def uninterrupted(sharded, forty_windows, references):
    """uninterrupted(size, mode): options, and the directory of the run with them that nobody stopped, made once."""

    def get(size: int, mode: str):
        options, directory = (
            new(forty_windows, mode, "--dropout", 0.1),
            references / f"{mode}-{size}",
        )
        if not directory.exists():
            _, codes = finished(sharded(size, directory, *options))
            assert codes == [0] * size
        return options, directory

    return get


# ---- the same run, however many have a part of it


def records_of(path) -> dict[str, int]:
    """Name and size of each record of a checkpoint."""
    with zipfile.ZipFile(path) as archive:
        return {
            record.filename: record.file_size
            for record in archive.infolist()
            if record.filename != "archive/data.pkl"
        }


@pytest.mark.parametrize(
    "mode", [pytest.param("standard", marks=pytest.mark.campaign), "geometric"]
)
def test_two_and_four_parts_train_the_model_of_one_process(
    sharded, group, float32_muon, forty_windows, tmp_path, mode
):
    layers = ["--layers", 2]
    finished(
        group(
            1,
            *OPTIONS,
            *MODES[mode],
            *layers,
            "--data",
            forty_windows,
            "--checkpoint-dir",
            tmp_path / "1",
        )
    )
    for size in (2, 4):
        directory = tmp_path / str(size)
        texts, codes = finished(sharded(size, directory, *new(forty_windows, mode, *layers)))
        assert "🧠 ByteLM, 1" in texts[0] and f" parameters, on {size} x cpu: " in texts[0]
        assert (
            codes == [0] * size and "All steps done" in texts[0] and texts[1:] == [""] * (size - 1)
        ), texts
        assert {path.name for path in directory.iterdir()} == {
            "best.pt",
            "final.pt",
            "metrics.csv",
            "run.lock",
            "step_3.pt",
            "step_6.pt",
        }
        assert_close_run(directory, tmp_path / "1")
    alone, shared = (records_of(tmp_path / size / "final.pt") for size in ("1", "2"))
    assert (
        alone == shared and zipfile.ZipFile(tmp_path / "2" / "final.pt").testzip() is None
    )  # one format
    a, b = (
        final(tmp_path / "1"),
        torch.load(tmp_path / "2" / "final.pt", weights_only=True, mmap=True),
    )
    assert list(a) == list(b) and {
        name: weight.shape for name, weight in a["model_state_dict"].items()
    } == {name: weight.shape for name, weight in b["model_state_dict"].items()}


@pytest.mark.parametrize(
    "mode, size",
    [
        ("geometric", 2),
        *(
            pytest.param(*case, marks=pytest.mark.campaign)
            for case in [("standard", 2), ("controller", 2), ("geometric", 4)]
        ),
    ],
)
def test_stopped_by_any_rank_and_resumed_is_the_same_run(
    sharded, uninterrupted, tmp_path, mode, size
):
    options, whole = uninterrupted(size, mode)
    directory = tmp_path / "stopped"
    for rank, signum, moment in [
        (size - 1, signal.SIGTERM, Moment("forward_backward", 3)),
        (0, signal.SIGUSR1, Moment("evaluate")),
    ]:
        stop = (moment, lambda frame, signum=signum: os.kill(os.getpid(), signum))
        texts, codes = finished(sharded(size, directory, *options, plans={rank: [stop]}))
        assert codes == [128 + signum] * size and texts[0].count("Exit requested") == 1, texts
        state = t.load_checkpoint(saved_path(texts[0]))
        assert state["exit_reason"] == f"signal_{signum.name}" and 1 <= state["step"] < STEPS
        options = ["--resume", "latest"]
    texts, codes = finished(sharded(size, directory, *options))
    assert codes == [0] * size, texts
    assert_same_run(directory, whole)


def test_a_run_goes_on_on_any_number_of_ranks_sharded_or_not(
    sharded, group, fork, float32_muon, forty_windows, tmp_path
):
    """Without a word of conversion: the next command line only says how many processes there are.

    One process alone shares nothing out, which does not keep those after it from that.
    """
    finished(
        group(
            1,
            *OPTIONS,
            *MODES["geometric"],
            "--data",
            forty_windows,
            "--steps",
            16,
            "--checkpoint-dir",
            tmp_path / "whole",
        )
    )
    directory, arguments = tmp_path / "moved", new(forty_windows, "geometric", "--steps", 16)
    stop = [(Moment("_complete", event="return"), send_sigterm)]
    for size in (1, 2, 4):
        texts, codes = finished(sharded(size, directory, *arguments, plans={0: stop}))
        assert codes == [143] * size, texts
        arguments = ["--resume", "latest"]
    alone = fork("--resume", saved_path(texts[0]), plan=stop)
    path = saved_path(alone.finish())
    assert alone.exitcode == 143 and t.load_checkpoint(path)["config"]["shard"]
    # Shared out again: the stop comes only after something was gathered.
    gathered = [(Moment("full_tensor", file="_api.py"), lambda frame: None)]
    texts, codes = finished(group(2, "--resume", path, plans={0: [*gathered, *stop]}))
    assert codes == [143, 143], texts
    texts, codes = finished(group(4, "--resume", saved_path(texts[0]), "--no-shard"))
    assert codes == [0] * 4, texts
    assert_close_run(directory, tmp_path / "whole")


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.campaign)])
def test_layers_in_a_module_list_train_as_in_one_process(group, tmp_path, size):
    train = program(classify(Residual))
    finished(group(1, "--checkpoint-dir", tmp_path / "1", program=train))
    texts, codes = finished(
        group(size, "--shard", "--checkpoint-dir", tmp_path / "n", program=train)
    )
    assert codes == [0] * size, texts
    assert_close_run(tmp_path / "n", tmp_path / "1")


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.campaign), 4])
def test_a_plain_cnn_trains_as_without_shard(group, tmp_path, size):
    """Its BatchNorm sees a rank's part of a batch, so one process is no measure. Four share out ten rows unequally."""
    train = program(classify(lambda: cnn(dropout=0.0)))
    finished(group(size, "--checkpoint-dir", tmp_path / "whole", program=train))
    texts, codes = finished(
        group(size, "--shard", "--checkpoint-dir", tmp_path / "n", program=train)
    )
    assert codes == [0] * size, texts
    assert_close_run(tmp_path / "n", tmp_path / "whole")
    a, b = (
        torch.load(tmp_path / name / "final.pt", weights_only=True)["model_state_dict"]
        for name in ("n", "whole")
    )
    assert {name: weight.shape for name, weight in a.items()} == {
        name: weight.shape for name, weight in b.items()
    }


OWN = {"cnn": classify(cnn), "layers": classify(Residual), "gan": train_gan}


@pytest.mark.parametrize(
    "model", ["cnn", "gan", pytest.param("layers", marks=pytest.mark.campaign)]
)
def test_a_model_of_ones_own_resumes_bit_for_bit(group, tmp_path, model):
    train = program(OWN[model])
    finished(group(2, "--shard", "--checkpoint-dir", tmp_path / "whole", program=train))
    stop = [(Moment("_complete", 2, event="return"), send_sigterm)]
    texts, codes = finished(
        group(2, "--shard", "--checkpoint-dir", tmp_path / "ck", program=train, plans={1: stop})
    )
    assert codes == [143, 143], texts
    texts, codes = finished(
        group(2, "--resume", "latest", "--checkpoint-dir", tmp_path / "ck", program=train)
    )
    assert codes == [0, 0] and "Resumed at step" in texts[0], texts
    assert_same_run(tmp_path / "ck", tmp_path / "whole")


def test_no_rank_but_the_one_that_saves_has_the_whole_model(sharded, forty_windows, tmp_path):
    """Peak memory while it starts, trains, evaluates, saves and resumes; rank 0 alone gathers all."""

    def as_of_a_large_model(frame) -> None:
        # Of tensors this small glibc's heap keeps most of what it once held. Large ones go back to the system.
        ctypes.CDLL(None).mallopt(-3, 256 * 1024)

    def peaks(size: int, name: str, *options: object) -> int:
        ranks = sharded(
            size,
            tmp_path / name,
            *options,
            plans={rank: [(Moment("train"), as_of_a_large_model)] for rank in range(size)},
        )
        _, codes = finished(ranks)
        assert codes == [0] * size
        return max(rank.peak for rank in ranks[size > 1 :]) * 1024

    wide = [
        "--dim",
        256,
        "--heads",
        4,
        "--layers",
        4,
        "--steps",
        1,
        "--save-every",
        1,
        "--eval-every",
        1,
        "--log-every",
        1,
    ]
    weights = (
        4 * 4 * 12 * 256**2
    )  # bytes; as much for their gradients, more for momentum, moments and the copy that is saved
    small = peaks(1, "small", *new(forty_windows, "geometric", *wide[6:]))
    options = new(forty_windows, "geometric", *wide)
    one = peaks(1, "1", *options) - small
    assert one > 3 * weights
    for each in (options, ["--resume", tmp_path / "1" / "step_1.pt", "--steps", 2]):
        four = peaks(4, "4", *each) - small
        assert four < one / 2, (one, four, weights)


# ---- stops and saves


def test_training_goes_on_while_rank_0_writes_and_leaving_waits_for_it(
    sharded, forty_windows, tmp_path
):
    options, plan = new(forty_windows, "standard", *ENDLESS), [(Moment("save_checkpoint"), None)]
    ranks = sharded(2, tmp_path, *options, plans={0: plan})
    ranks[0].terminal.expect(r"step \d+/")
    ranks[0].terminal.send("s\n")
    ranks[0].paused()
    begun = len(metrics_without_times(tmp_path))
    wait_until(lambda: len(metrics_without_times(tmp_path)) > begun + 20)
    assert not list(tmp_path.glob("step_*"))
    ranks[0].terminal.send("q\n")
    ranks[0].terminal.expect("Saving emergency checkpoint")
    ranks[0].go()
    ranks[0].terminal.expect("Checkpoint saved: ")
    texts, codes = finished(ranks)
    assert codes == [0, 0] and len(list(tmp_path.glob("step_*"))) == 1
    reason = t.load_checkpoint(saved_path(texts[0]))["exit_reason"]
    assert reason == "user_requested_graceful_exit"


@pytest.mark.parametrize("where", ["save_checkpoint", "evaluate", "full_tensor"])
def test_a_request_in_the_middle_of_a_save_or_an_evaluation(
    sharded, forty_windows, tmp_path, where
):
    file = "_api.py" if where == "full_tensor" else SCRIPT.name
    plan = [(Moment("_at_boundary", 3), lambda frame: None), (Moment(where, file=file), None)]
    ranks = sharded(2, tmp_path, *new(forty_windows), plans={0: plan})
    ranks[0].paused()
    ranks[1].kill(signal.SIGTERM)
    ranks[0].kill(signal.SIGTERM)
    ranks[0].terminal.expect("Exit requested")
    ranks[0].go()
    texts, codes = finished(ranks)
    assert codes == [143, 143], texts
    assert "Emergency checkpoint saved" in texts[0]
    assert whole_files(tmp_path) and not list(tmp_path.rglob(".*tmp"))


def no_room(frame) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("function", ["save_checkpoint", "to_host"])
def test_a_disk_or_memory_that_is_full(sharded, forty_windows, tmp_path, function):
    options = new(forty_windows, "standard", *ENDLESS)
    ranks = sharded(2, tmp_path, *options, plans={0: [(Moment(function), no_room)]})
    ranks[0].terminal.expect(r"step \d+/")
    what = "step_[0-9]+.pt" if function == "to_host" else "❌ Emergency checkpoint"
    ranks[0].terminal.send("s\n" if function == "to_host" else "q\n")
    ranks[0].terminal.expect(f"{what} not saved: No space left on device. Training goes on")
    assert not list(tmp_path.rglob("*.pt*"))
    ranks[0].terminal.expect(r"step \d+/")
    ranks[0].terminal.send("q\n")
    texts, codes = finished(ranks)
    assert codes == [0, 0] and "Graceful exit completed" in texts[0]
    assert len(whole_files(tmp_path)) == 1


def test_after_a_signal_a_full_disk_sends_it_to_the_temporary_directory(
    group, forty_windows, tmp_path
):
    def go_on(*options: object, plans: dict) -> tuple[str, list[int]]:
        ranks = group(2, *options, plans=plans, TMPDIR=str(tmp_path))
        texts, codes = finished(ranks)
        return texts[0], codes

    stop = [(Moment("_complete", event="return"), send_sigterm)]
    options = ["--checkpoint-dir", tmp_path / "ck", *new(forty_windows, "standard", *ENDLESS)]
    full = {1: stop, 0: [(Moment("save_checkpoint"), no_room)]}
    text, codes = go_on(*options, plans=full)
    assert codes == [143, 143] and "Trying the temporary directory" in text
    path = saved_path(text)
    assert path.parent == tmp_path and path.name.startswith("train_graceful_")
    text, codes = go_on("--resume", path, plans={0: stop})
    assert codes == [143, 143] and f"from {path}" in text
    assert saved_path(text).parent == tmp_path / "ck" / "emergency_exit"


# ---- failures


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("moment", [("forward_backward", 5), ("orthogonalize", 14)])
def test_after_an_exception_nothing_is_saved_and_the_newest_whole_checkpoint_is_named(
    sharded, uninterrupted, tmp_path, rank, moment
):
    """The others' parts are out of reach. Resumed from there, it is the same run."""
    options, reference = uninterrupted(2, "geometric")
    ranks = sharded(2, tmp_path, *options, plans={rank: [(Moment(*moment), fail)]})
    texts, codes = finished(ranks)
    assert codes == [1, 1] and "RuntimeError: injected" in texts[rank], texts
    assert "out of reach: nothing half-updated is saved" in texts[0]
    assert "Graceful exit completed" not in texts[0] and not (tmp_path / "emergency_exit").exists()
    newest = re.search(r"Newest whole checkpoint: (\S+/(?:step_3|best).pt)\r\n", texts[0])[1]
    step = t.load_checkpoint(newest)["step"]
    texts, codes = finished(sharded(2, tmp_path, "--resume", newest))
    assert codes == [0, 0] and f"Resumed at step {step} of" in texts[0], texts
    assert_same_run(tmp_path, reference)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_dies_outright_takes_its_part_with_it(sharded, forty_windows, tmp_path, killed):
    """The others notice, and end in bounded time; the checkpoints from before are whole."""
    options = new(forty_windows, "standard", "--steps", 10**6, "--save-every", 5)
    ranks = sharded(2, tmp_path, *options)
    ranks[0].terminal.expect(r"step 1\d/")
    ranks[killed].kill(signal.SIGKILL)
    texts, codes = finished(ranks)
    assert codes[killed] == -9 and codes[1 - killed] == 1
    if killed == 1:
        assert "Newest whole checkpoint: " in texts[0], texts
    assert whole_files(tmp_path)


# ---- damage


def test_damage_is_found_by_all_ranks_together_and_skipped_by_latest(
    sharded, forty_windows, tmp_path
):
    finished(sharded(2, tmp_path / "ck", *new(forty_windows)))
    flip_a_weight(tmp_path / "ck" / "final.pt", tmp_path / "flipped.pt")
    texts, codes = finished(sharded(2, tmp_path / "ck", "--resume", tmp_path / "flipped.pt"))
    assert codes == [2, 2]
    for text in texts:
        assert re.fullmatch(
            rf"error: {tmp_path}/flipped.pt: damaged checkpoint .record data/[0-9]+.\r\n", text
        )
    (tmp_path / "cut.pt").write_bytes((tmp_path / "ck" / "final.pt").read_bytes()[:-5000])
    texts, codes = finished(sharded(2, tmp_path / "ck", "--resume", tmp_path / "cut.pt"))
    assert codes == [2, 2] and all("cut.pt: damaged, or not a checkpoint" in text for text in texts)
    for name in ("final.pt", "best.pt"):
        flip_a_weight(tmp_path / "ck" / name, tmp_path / "ck" / name)
    texts, codes = finished(sharded(2, tmp_path / "ck", "--resume", "latest"))
    assert codes == [0, 0] and "Resumed at step 6 of" in texts[0], texts
    assert f"⚠️ Skipped {tmp_path}/ck/final.pt: damaged" in texts[0] and not texts[1]
    assert whole_files(tmp_path / "ck")["final.pt"] == STEPS


def test_meta_tensors_are_refused(tmp_path):
    torch.save({"a": torch.empty(2**50, device="meta")}, tmp_path / "a.pt")
    with pytest.raises(t.CheckpointError, match="it refers to"):
        t.load_checkpoint(tmp_path / "a.pt")


# ---- mistakes, and torchrun itself


def test_mistakes_say_what_to_do_instead(group, forty_windows, tmp_path):
    assert "--shard needs processes: scripts/train_torchrun.sh 2 --shard" in refused(
        "--shard", "--data", forty_windows, *OPTIONS
    )
    finished(group(1, *new(forty_windows), "--checkpoint-dir", tmp_path / "ck"))
    texts, codes = finished(group(2, "--resume", tmp_path / "ck" / "step_6.pt", "--dim", 32))
    assert codes == [2, 2] and "--dim 32 does not fit the checkpoint" in texts[0]


def with_a_scalar() -> nn.Module:
    model = Residual()
    model.temperature = nn.Parameter(torch.tensor(1.0))
    return model


def test_what_cannot_be_sharded_gets_a_line(group, tmp_path):
    own = program(classify(with_a_scalar))
    texts, codes = finished(group(2, "--shard", "--checkpoint-dir", tmp_path, program=own))
    assert codes == [2, 2]
    for text in texts:
        assert "error: --shard: fully_shard doesn't support scalar parameters" in text, texts
        assert text.count("error: ") == 1 and "Traceback" not in text
    assert not list(tmp_path.rglob("*.pt"))


def test_a_layer_that_is_in_two_lists_is_one_unit(group, tmp_path):
    def twice() -> nn.Module:
        model = Residual()
        model.again = nn.ModuleList([model.layers[1]])
        return model

    texts, codes = finished(
        group(2, "--shard", "--checkpoint-dir", tmp_path, program=program(classify(twice)))
    )
    assert codes == [0, 0], texts


def test_q_in_torchruns_terminal_and_on_from_there(spawn, forty_windows, tmp_path):
    child = torchrun(
        spawn, SCRIPT, *new(forty_windows, "geometric", *ENDLESS), "--checkpoint-dir", tmp_path
    )
    child.expect(r"step \d+/")
    workers = worker_pids(child.pid)
    child.send("q\n")
    text = finish(child)
    assert (
        child.exitstatus == 0 and "Graceful exit completed" in text and not any(map(alive, workers))
    )
    path = saved_path(text)
    assert f"--nproc-per-node=2 {SCRIPT} --resume {path}" in text.partition("Resume with: ")[2]
    child = torchrun(spawn, SCRIPT, "--resume", path, "--checkpoint-dir", tmp_path, size=1)
    child.expect(f"Resumed at step {t.load_checkpoint(path)['step']} of")
    child.expect(r"step \d+/")
    workers = worker_pids(child.pid)
    child.kill(signal.SIGTERM)
    finish(child)
    assert len(list((tmp_path / "emergency_exit").glob("*.pt"))) == 2 and not any(
        map(alive, workers)
    )


def test_torchrun_killed_outright_leaves_no_worker_and_what_was_saved_before(
    spawn, forty_windows, tmp_path
):
    options = new(forty_windows, "standard", "--steps", 10**6, "--save-every", 5)
    child = torchrun(spawn, SCRIPT, *options, "--checkpoint-dir", tmp_path)
    child.expect(r"step \d+/")
    wait_until(lambda: list(tmp_path.glob("step_*.pt")))
    workers = worker_pids(child.pid)
    os.kill(child.pid, signal.SIGKILL)
    wait_until(lambda: not any(map(alive, workers)))
    assert whole_files(tmp_path) and t.latest_checkpoint(tmp_path)
