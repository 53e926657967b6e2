"""--shard: every rank has a part of the model and writes it into the one file; any number of ranks, one included, goes on from it."""

import ctypes
import errno
import itertools
import os
import re
import shutil
import signal
import zipfile

import pytest
import torch
from campaign import Campaign, Moment, fail, needs_strace, trace, whole_files
from conftest import (
    ENDLESS,
    MODES,
    SCRIPT,
    assert_same_run,
    finish,
    flip_a_weight,
    metrics_without_times,
    refused,
    saved_path,
    wait_until,
)
from own_models import Images, Residual, classify, cnn, program, train_gan
from ranks import (
    OPTIONS,
    STEPS,
    alive,
    assert_close_run,
    final,
    finished,
    torchrun,
    worker_pids,
)
from torch import nn
from torch.nn import functional as F

import train_graceful as t


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
        options, directory = new(forty_windows, mode, "--dropout", 0.1), references / f"{mode}-{size}"
        if not directory.exists():
            _, codes = finished(sharded(size, directory, *options))
            assert codes == [0] * size
        return options, directory

    return get


# ---- the same run, however many have a part of it


def records_of(path) -> dict[str, int]:
    """Name and size of each record of a checkpoint."""
    with zipfile.ZipFile(path) as archive:
        return {record.filename: record.file_size for record in archive.infolist() if record.filename != "archive/data.pkl"}


@pytest.mark.parametrize("mode", [pytest.param("standard", marks=pytest.mark.campaign), "geometric"])
def test_two_and_four_parts_train_the_model_of_one_process(sharded, group, float32_muon, forty_windows, tmp_path, mode):
    layers = ["--layers", 2]
    finished(group(1, *OPTIONS, *MODES[mode], *layers, "--data", forty_windows, "--checkpoint-dir", tmp_path / "1"))
    for size in (2, 4):
        directory = tmp_path / str(size)
        texts, codes = finished(sharded(size, directory, *new(forty_windows, mode, *layers)))
        assert "🧠 ByteLM, 1" in texts[0] and f" parameters, on {size} x cpu: " in texts[0]
        assert codes == [0] * size and "All steps done" in texts[0] and texts[1:] == [""] * (size - 1), texts
        assert {path.name for path in directory.iterdir()} == {"best.pt", "final.pt", "metrics.csv", "run.lock", "step_3.pt", "step_6.pt"}
        assert_close_run(directory, tmp_path / "1")
    alone, shared = (records_of(tmp_path / size / "final.pt") for size in ("1", "2"))
    assert alone == shared and zipfile.ZipFile(tmp_path / "2" / "final.pt").testzip() is None  # one format
    a, b = final(tmp_path / "1"), torch.load(tmp_path / "2" / "final.pt", weights_only=True, mmap=True)
    assert list(a) == list(b) and {name: weight.shape for name, weight in a["model_state_dict"].items()} == {
        name: weight.shape for name, weight in b["model_state_dict"].items()}


@pytest.mark.parametrize("mode, size", [("geometric", 2), *(
    pytest.param(*case, marks=pytest.mark.campaign) for case in [("standard", 2), ("controller", 2), ("geometric", 4)])])
def test_stopped_by_any_rank_and_resumed_is_the_same_run(sharded, uninterrupted, tmp_path, mode, size):
    options, whole = uninterrupted(size, mode)
    directory = tmp_path / "stopped"
    for rank, signum, moment in [(size - 1, signal.SIGTERM, Moment("forward_backward", 3)), (0, signal.SIGUSR1, Moment("evaluate", 2))]:
        stop = (moment, lambda frame, signum=signum: os.kill(os.getpid(), signum))
        texts, codes = finished(sharded(size, directory, *options, plans={rank: [stop]}))
        assert codes == [128 + signum] * size and texts[0].count("Exit requested") == 1, texts
        state = t.load_checkpoint(saved_path(texts[0]))
        assert state["exit_reason"] == f"signal_{signum.name}" and 1 <= state["step"] < STEPS
        options = ["--resume", "latest"]
    texts, codes = finished(sharded(size, directory, *options))
    assert codes == [0] * size, texts
    assert_same_run(directory, whole)


def test_a_run_goes_on_on_any_number_of_ranks_sharded_or_not(sharded, group, fork, float32_muon, forty_windows, tmp_path):
    """Without a word of conversion: the next command line only says how many processes there are."""
    finished(group(1, *OPTIONS, *MODES["geometric"], "--data", forty_windows, "--steps", 16, "--checkpoint-dir", tmp_path / "whole"))
    directory, arguments = tmp_path / "moved", new(forty_windows, "geometric", "--steps", 16)
    stop = [(Moment("_complete", event="return"), lambda frame: os.kill(os.getpid(), signal.SIGTERM))]
    for size in (1, 2, 4):
        texts, codes = finished(sharded(size, directory, *arguments, plans={0: stop}))
        assert codes == [143] * size, texts
        arguments = ["--resume", "latest"]
    assert t.load_checkpoint(saved_path(texts[0]))["config"]["shard"]
    alone = fork("--resume", saved_path(texts[0]), plan=stop)
    path = saved_path(alone.finish())
    assert alone.exitcode == 143 and not t.load_checkpoint(path)["config"]["shard"]
    texts, codes = finished(group(2, "--resume", path, "--shard", plans={0: stop}))
    assert codes == [143, 143], texts
    texts, codes = finished(group(4, "--resume", saved_path(texts[0]), "--no-shard"))
    assert codes == [0] * 4, texts
    assert_close_run(directory, tmp_path / "whole")


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.campaign)])
def test_layers_in_a_module_list_train_as_in_one_process(group, tmp_path, size):
    train = program(classify(Residual))
    finished(group(1, "--checkpoint-dir", tmp_path / "1", program=train))
    texts, codes = finished(group(size, "--shard", "--checkpoint-dir", tmp_path / "n", program=train))
    assert codes == [0] * size, texts
    assert_close_run(tmp_path / "n", tmp_path / "1")


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.campaign), 4])
def test_a_plain_cnn_trains_as_without_shard(group, tmp_path, size):
    """Its BatchNorm sees a rank's part of a batch, so one process is no measure. Four share out ten rows unequally."""
    train = program(classify(lambda: cnn(dropout=0.0)))
    finished(group(size, "--checkpoint-dir", tmp_path / "whole", program=train))
    texts, codes = finished(group(size, "--shard", "--checkpoint-dir", tmp_path / "n", program=train))
    assert codes == [0] * size, texts
    assert_close_run(tmp_path / "n", tmp_path / "whole")
    a, b = (torch.load(tmp_path / name / "final.pt", weights_only=True)["model_state_dict"] for name in ("n", "whole"))
    assert {name: weight.shape for name, weight in a.items()} == {name: weight.shape for name, weight in b.items()}


OWN = {"cnn": classify(cnn), "layers": classify(Residual), "gan": train_gan}


@pytest.mark.parametrize("model", ["cnn", "gan", pytest.param("layers", marks=pytest.mark.campaign)])
def test_a_model_of_ones_own_resumes_bit_for_bit(group, tmp_path, model):
    train = program(OWN[model])
    finished(group(2, "--shard", "--checkpoint-dir", tmp_path / "whole", program=train))
    stop = [(Moment("_complete", 2, event="return"), lambda frame: os.kill(os.getpid(), signal.SIGTERM))]
    texts, codes = finished(group(2, "--shard", "--checkpoint-dir", tmp_path / "ck", program=train, plans={1: stop}))
    assert codes == [143, 143], texts
    texts, codes = finished(group(2, "--resume", "latest", "--checkpoint-dir", tmp_path / "ck", program=train))
    assert codes == [0, 0] and "Resumed at step" in texts[0], texts
    assert_same_run(tmp_path / "ck", tmp_path / "whole")


def test_no_rank_has_the_whole_model(sharded, forty_windows, tmp_path):
    """Peak memory while it starts, trains, evaluates, saves and resumes: of the state, each of four has its quarter."""
    def as_of_a_large_model(frame) -> None:
        # Of tensors this small glibc's heap keeps most of what it once held. Large ones go back to the system.
        ctypes.CDLL(None).mallopt(-3, 256 * 1024)

    def peaks(size: int, name: str, *options: object) -> int:
        ranks = sharded(size, tmp_path / name, *options, plans={rank: [(Moment("train"), as_of_a_large_model)] for rank in range(size)})
        _, codes = finished(ranks)
        assert codes == [0] * size
        return max(rank.peak for rank in ranks) * 1024

    wide = ["--dim", 256, "--heads", 4, "--layers", 4, "--steps", 1, "--save-every", 1, "--eval-every", 1, "--log-every", 1]
    weights = 4 * 4 * 12 * 256**2  # bytes; as much for their gradients, more for momentum, moments and the copy that is saved
    small = peaks(1, "small", *new(forty_windows, "geometric", *wide[6:]))
    options = new(forty_windows, "geometric", *wide)
    one = peaks(1, "1", *options) - small
    assert one > 3 * weights
    for each in (options, ["--resume", tmp_path / "1" / "step_1.pt", "--steps", 2]):
        four = peaks(4, "4", *each) - small
        assert four < one / 2, (one, four, weights)


# ---- stops and saves


def test_training_goes_on_while_parts_are_written_until_leaving_waits_for_them(sharded, forty_windows, tmp_path):
    ranks = sharded(2, tmp_path, *new(forty_windows, "standard", *ENDLESS), plans={1: [(Moment("write_parts"), None)]})
    ranks[0].terminal.expect(r"step \d+/")
    ranks[0].terminal.send("s\n")
    ranks[1].paused()
    begun = len(metrics_without_times(tmp_path))
    wait_until(lambda: len(metrics_without_times(tmp_path)) > begun + 20)
    assert not list(tmp_path.glob("step_*"))
    ranks[0].terminal.send("q\n")
    ranks[0].terminal.expect("Saving emergency checkpoint")
    ranks[1].go()
    ranks[0].terminal.expect("Checkpoint saved: ")
    texts, codes = finished(ranks)
    assert codes == [0, 0] and len(list(tmp_path.glob("step_*"))) == 1
    assert t.load_checkpoint(saved_path(texts[0]))["exit_reason"] == "user_requested_graceful_exit"


@pytest.mark.parametrize("where", ["publish", "evaluate", pytest.param("write_parts", marks=pytest.mark.campaign)])
def test_a_request_in_the_middle_of_a_save_or_an_evaluation(sharded, forty_windows, tmp_path, where):
    plan = [(Moment(where, 2), None)]
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


@pytest.mark.parametrize("function, full", [
    ("write_without_data", 0), ("write_parts", 1), ("publish", 0), ("host_copy", 1),
    *(pytest.param(*case, marks=pytest.mark.campaign) for case in [("write_parts", 0), ("host_copy", 0)])])
def test_a_disk_or_memory_that_is_full_on_one_rank(sharded, forty_windows, tmp_path, function, full):
    def no_room(frame) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ranks = sharded(2, tmp_path, *new(forty_windows, "standard", *ENDLESS), plans={full: [(Moment(function), no_room)]})
    ranks[0].terminal.expect(r"step \d+/")
    if function == "host_copy":
        ranks[0].terminal.send("s\n")
        ranks[0].terminal.expect("step_[0-9]+.pt not saved: No space left on device. Training goes on.")
    else:
        ranks[0].terminal.send("q\n")
        ranks[0].terminal.expect("❌ Emergency checkpoint not saved: No space left on device. Training goes on")
        assert not list(tmp_path.rglob("*.pt*"))
    ranks[0].terminal.expect(r"step \d+/")
    ranks[0].terminal.send("q\n")
    texts, codes = finished(ranks)
    assert codes == [0, 0] and "Graceful exit completed" in texts[0]
    assert len(whole_files(tmp_path)) == 1


def test_after_a_signal_a_full_disk_sends_all_parts_to_the_fallback(group, forty_windows, tmp_path):
    def full(frame) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ranks = group(2, "--checkpoint-dir", tmp_path / "ck", *new(forty_windows, "standard", *ENDLESS), plans={1: [(Moment("write_parts"), full)]},
                  TMPDIR=str(tmp_path))
    ranks[0].terminal.expect(r"step \d+/")
    ranks[1].kill(signal.SIGTERM)
    texts, codes = finished(ranks)
    assert codes == [143, 143] and "Trying the temporary directory" in texts[0]
    path = saved_path(texts[0])
    assert path.parent.parent == tmp_path and path.parent.name.startswith("train_graceful_")
    stop = (Moment("_complete", event="return"), lambda frame: os.kill(os.getpid(), signal.SIGTERM))
    texts, codes = finished(group(2, "--checkpoint-dir", tmp_path / "ck", "--resume", "latest", plans={0: [stop]}, TMPDIR=str(tmp_path)))
    assert codes == [143, 143] and f"from {path}" in texts[0]


# ---- failures


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("mode, moment", [
    ("standard", Moment("forward", 14, where=lambda frame: type(frame.f_locals["self"]).__name__ == "Experts")),
    ("geometric", Moment("backward", 7, file="_tensor.py")),
    ("geometric", Moment("__getitem__", 14, where=lambda frame: "corpus" in vars(frame.f_locals["self"]))),
])
def test_an_exception_in_one_rank_saves_what_all_had_before(sharded, uninterrupted, tmp_path, whole, rank, mode, moment):
    """Each writes its part, though no group of theirs works any more; resumed, it is the same run."""
    if not whole and (moment.function, rank) != ("backward", 1):
        pytest.skip("the whole of it is a campaign")
    options, reference = uninterrupted(2, mode)
    ranks = sharded(2, tmp_path / "ck", *options, plans={rank: [(moment, fail)]})
    texts, codes = finished(ranks)
    assert codes == [1, 1] and "RuntimeError: injected" in texts[rank] and "Traceback" not in texts[1 - rank], texts
    assert (f"RuntimeError in rank {rank}." in texts[0]) == (rank == 1)
    state = t.load_checkpoint(saved_path(texts[0]))
    assert state["exit_reason"] == "exception_RuntimeError" and 1 <= state["step"] < STEPS
    texts, codes = finished(sharded(2, tmp_path / "ck", "--resume", "latest"))
    assert codes == [0, 0] and f"Resumed at step {state['step']} of" in texts[0]
    assert_same_run(tmp_path / "ck", reference)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_in_the_middle_of_an_update_saves_nothing_half_updated(sharded, forty_windows, tmp_path, rank):
    ranks = sharded(2, tmp_path, *new(forty_windows), plans={rank: [(Moment("_update_all", 14), fail)]})
    texts, codes = finished(ranks)
    assert codes == [1, 1] and "nothing half-updated is saved" in texts[0], texts
    assert "Graceful exit completed" not in texts[0]
    assert re.search(r"Newest whole checkpoint: \S+/(step_3|best).pt\n", texts[0].replace("\r", "")) and not (tmp_path / "emergency_exit").exists()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_dies_outright_takes_its_part_with_it(sharded, forty_windows, tmp_path, killed):
    """The others notice, say so and end in bounded time; the checkpoints from before are whole."""
    def impatient(frame) -> None:
        frame.f_globals["StoreWriters"].ANSWER_SECONDS = 1

    ranks = sharded(2, tmp_path, *new(forty_windows, "standard", "--steps", 10**6, "--save-every", 5), plans={rank: [(Moment("train"), impatient)] for rank in (0, 1)})
    ranks[0].terminal.expect(r"step 1\d/")
    ranks[killed].kill(signal.SIGKILL)
    texts, codes = finished(ranks)
    assert codes[killed] == -9 and codes[1 - killed] == 1
    if killed == 1:
        assert "Rank 1, which has a part of the model, does not answer" in texts[0] and "Newest whole checkpoint: " in texts[0], texts
    assert whole_files(tmp_path)


def test_a_rank_that_is_stopped_in_a_save_fails_it_and_the_next_one_succeeds(sharded, forty_windows, tmp_path):
    """The others give up after a while, and all is well once it goes on."""
    def impatient(frame) -> None:
        frame.f_globals["StoreWriters"].ANSWER_SECONDS = 0.3

    waits = [(Moment("write_parts"), None)]
    ranks = sharded(2, tmp_path, *new(forty_windows, "standard", *ENDLESS), plans={0: [(Moment("train"), impatient)], 1: waits})
    ranks[0].terminal.expect(r"step \d+/")
    ranks[0].terminal.send("s\n")
    ranks[1].paused()
    ranks[1].kill(signal.SIGSTOP)
    ranks[0].terminal.expect("not saved: Rank 1, which has a part of the model, does not answer. Training goes on")
    ranks[1].kill(signal.SIGCONT)
    ranks[1].go()
    assert not list(tmp_path.rglob("*.pt*"))
    ranks[0].terminal.send("q\n")
    texts, codes = finished(ranks)
    assert codes == [0, 0] and "Graceful exit completed" in texts[0], texts
    assert t.load_checkpoint(saved_path(texts[0]))["exit_reason"] == "user_requested_graceful_exit"


@needs_strace
def test_killed_at_every_kind_of_call_of_a_sharded_save(sharded, uninterrupted, tmp_path, whole):
    """Rank 0 dies with SIGKILL at a call of its part of a save, or of the publishing; what has a name is whole, and the run goes on."""
    options, reference = uninterrupted(2, "standard")
    options = [*options, "--keep", 1]
    waits = [(Moment("_save", 3), None)]  # of step_6; step_3 and best are there
    calls = {"pwrite64": (9,), "rename": (1,)}
    if whole:  # each of them, up to the last, and of the parts, which are alike, some
        calls = {call: itertools.count(1) for call in ("openat", "fsync", "rename", "unlink")}
        calls |= {call: itertools.count(1, 25) for call in ("write", "pwrite64")}
    with Campaign("SIGKILL of a rank at every system call of a sharded save, then resumed") as campaign:
        for call, numbers in calls.items():
            more = True
            for number in numbers:
                directory = tmp_path / f"{call}-{number}"

                def killed() -> None:
                    nonlocal more
                    ranks = sharded(2, directory, *options, plans={0: waits})
                    strace = trace(ranks[0].paused(), directory.with_suffix(".trace"), "-e", f"inject={call}:signal=KILL:when={number}")
                    ranks[0].go()
                    ranks[0].finish()
                    strace.communicate()
                    if ranks[0].exitcode == 0:  # it has not so many such calls
                        ranks[1].finish()
                        more = False
                        campaign.cases -= 1
                        return
                    ranks[1].close()
                    assert whole_files(directory)
                    texts, codes = finished(sharded(2, directory, "--resume", "latest"))
                    assert codes == [0, 0], texts
                    assert not list(directory.rglob(".*.tmp"))
                    assert_same_run(directory, reference)

                campaign.case(directory.name, killed)
                shutil.rmtree(directory, ignore_errors=True)
                if not more:
                    break


@needs_strace
def test_every_write_of_a_sharded_save_fails_on_one_rank(sharded, forty_windows, tmp_path, whole):
    """All hear of it, nothing is left behind, and the run goes on to its end."""
    options = new(forty_windows, "standard", "--keep", 1)
    waits = [(Moment("_save", 3), None)]  # of step_6
    errors = itertools.cycle(["ENOSPC", "EIO", "EDQUOT", "EROFS"])
    with Campaign("ENOSPC, EIO, EDQUOT, EROFS at every open, write, fsync, rename of a rank in a sharded save") as campaign:
        for rank in (0, 1):
            calls = {"openat": range(1, 7), "pwrite64": range(1, 60, 7), "fsync": range(1, 4), "rename": [1]}
            if not whole:
                calls = {"pwrite64": [1]} if rank else {"fsync": [1]}
            for call, number in ((call, nth) for call, numbers in calls.items() for nth in numbers):
                directory, error = tmp_path / f"{rank}-{call}-{number}", next(errors)

                def failed() -> None:
                    ranks = sharded(2, directory, *options, plans={rank: waits})
                    strace = trace(ranks[rank].paused(), directory.with_suffix(".trace"), "-e", f"inject={call}:error={error}:when={number}")
                    ranks[rank].go()
                    texts, codes = finished(ranks)
                    strace.communicate()
                    assert codes == [0, 0], texts
                    files = whole_files(directory)
                    words = os.strerror(getattr(errno, error))
                    injected = "(INJECTED)" in directory.with_suffix(".trace").read_text()
                    if f"⚠️ step_6.pt not saved: {words}. Training goes on." in texts[0]:
                        # Where only its name could not be flushed it is there, and whole.
                        assert injected and ("step_6.pt" not in files or call in ("openat", "fsync"))
                    else:  # so few such calls, or one that a save may do without
                        assert "step_6.pt" in files, texts
                    assert files["final.pt"] == STEPS and not list(directory.rglob(".*.tmp"))

                campaign.case(directory.name, failed)
                shutil.rmtree(directory, ignore_errors=True)


# ---- damage and strangers


def test_damage_is_found_by_all_ranks_together_and_skipped_by_latest(sharded, forty_windows, tmp_path):
    finished(sharded(2, tmp_path / "ck", *new(forty_windows)))
    flip_a_weight(tmp_path / "ck" / "final.pt", tmp_path / "flipped.pt")
    texts, codes = finished(sharded(2, tmp_path / "ck", "--resume", tmp_path / "flipped.pt"))
    assert codes == [2, 2] and re.fullmatch(rf"error: {tmp_path}/flipped.pt: damaged checkpoint .record data/[0-9]+.\r\n", texts[0] + texts[1])
    (tmp_path / "cut.pt").write_bytes((tmp_path / "ck" / "final.pt").read_bytes()[:-5000])
    texts, codes = finished(sharded(2, tmp_path / "ck", "--resume", tmp_path / "cut.pt"))
    assert codes == [2, 2] and "cut.pt: damaged, or not a checkpoint" in texts[0]
    for name in ("final.pt", "best.pt"):
        flip_a_weight(tmp_path / "ck" / name, tmp_path / "ck" / name)
    texts, codes = finished(sharded(2, tmp_path / "ck", "--resume", "latest"))
    assert codes == [0, 0] and "Resumed at step 6 of" in texts[0], texts
    assert f"⚠️ Skipped {tmp_path}/ck/final.pt: damaged" in texts[0] and not texts[1]
    assert whole_files(tmp_path / "ck")["final.pt"] == STEPS


class Code:
    def __reduce__(self):
        return os.mkdir, ("/tmp/stranger_was_here",)


def test_a_strangers_file_runs_no_code_on_any_rank(sharded, tmp_path):
    torch.save({"format_version": Code()}, tmp_path / "stranger.pt")
    texts, codes = finished(sharded(2, tmp_path / "ck", "--resume", tmp_path / "stranger.pt"))
    assert codes == [2, 2] and "it refers to posix.mkdir" in texts[0], texts
    assert not os.path.exists("/tmp/stranger_was_here")


def test_meta_tensors_are_refused(tmp_path):
    torch.save({"a": torch.empty(2**50, device="meta")}, tmp_path / "a.pt")
    with pytest.raises(t.CheckpointError, match="it refers to"):
        t.load_checkpoint(tmp_path / "a.pt")


# ---- mistakes, and torchrun itself


def test_mistakes_say_what_to_do_instead(group, forty_windows, tmp_path):
    assert "--shard needs processes: scripts/train_torchrun.sh 2 --shard" in refused("--shard", "--data", forty_windows, *OPTIONS)
    finished(group(1, *new(forty_windows), "--checkpoint-dir", tmp_path / "ck"))
    texts, codes = finished(group(2, "--resume", tmp_path / "ck" / "step_6.pt", "--dim", 32))
    assert codes == [2, 2] and "--dim 32 does not fit the checkpoint" in texts[0]


def with_a_scalar() -> nn.Module:
    model = Residual()
    model.temperature = nn.Parameter(torch.tensor(1.0))
    return model


def with_one_weight_in_two_layers() -> nn.Module:
    model = Residual(layers=12)
    model.layers[10].weight = model.layers[1].weight
    return model


def with_a_weight_of_a_layer_elsewhere() -> nn.Module:
    model = Residual()
    model.extra = nn.Linear(24, 24)
    model.extra.weight = model.layers[0].weight
    return model


def trained_by(make_optimizer):
    def train(run: t.Run) -> None:
        run.data(Images(43, False))
        model = run.model(Residual())
        optimizer = run.keep(optimizer=make_optimizer(model.parameters()))
        for images, labels in run.batches():

            def closure():
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images), labels)
                loss.backward()
                return loss

            run.log(loss=optimizer.step(closure))

    return train


def averaged(run: t.Run) -> None:
    run.data(Images(43, False))
    run.keep(ema=torch.optim.swa_utils.AveragedModel(run.model(Residual())))
    list(run.batches())


@pytest.mark.parametrize("train, message", [
    (classify(with_a_scalar), "--shard: fully_shard doesn't support scalar parameters. Change temperature to a 1D tensor"),
    (classify(with_one_weight_in_two_layers), "--shard: layers.1.weight and layers.10.weight are one parameter in two units"),
    (classify(with_a_weight_of_a_layer_elsewhere), "--shard: layers.0.weight and extra.weight are one parameter in two units"),
    (trained_by(torch.optim.Adafactor), "--shard: PyTorch cannot share out what Adafactor does"),
    (trained_by(torch.optim.LBFGS), "this run could not be saved: .*'optimizer'.* is spread over processes, but not by its rows"),
    (averaged, "--shard: PyTorch cannot share out what AveragedModel does"),
])
def test_what_cannot_be_sharded_gets_a_line(group, tmp_path, train, message):
    texts, codes = finished(group(2, "--shard", "--checkpoint-dir", tmp_path, program=program(train)))
    together = "".join(texts)  # after a batch, who has failed first says why
    assert codes == [2, 2] and re.search(rf"(?m)^error: {message}", together), texts
    assert together.count("error: ") == 1 and "Traceback" not in together and not list(tmp_path.rglob("*.pt"))


def test_a_layer_that_is_in_two_lists_is_one_unit(group, tmp_path):
    def twice() -> nn.Module:
        model = Residual()
        model.again = nn.ModuleList([model.layers[1]])
        return model

    texts, codes = finished(group(2, "--shard", "--checkpoint-dir", tmp_path, program=program(classify(twice))))
    assert codes == [0, 0], texts


def test_q_in_torchruns_terminal_and_on_from_there(spawn, forty_windows, tmp_path):
    child = torchrun(spawn, SCRIPT, *new(forty_windows, "geometric", *ENDLESS), "--checkpoint-dir", tmp_path)
    child.expect(r"step \d+/")
    workers = worker_pids(child.pid)
    child.send("q\n")
    text = finish(child)
    assert child.exitstatus == 0 and "Graceful exit completed" in text and not any(map(alive, workers))
    path = saved_path(text)
    assert re.search(rf"Resume with: \S*scripts/train_torchrun.sh 2 --resume {path}", text)
    child = torchrun(spawn, SCRIPT, "--resume", path, "--checkpoint-dir", tmp_path, size=1)
    child.expect(f"Resumed at step {t.load_checkpoint(path)['step']} of")
    child.expect(r"step \d+/")
    workers = worker_pids(child.pid)
    child.kill(signal.SIGTERM)
    finish(child)
    assert len(list((tmp_path / "emergency_exit").glob("*.pt"))) == 2 and not any(map(alive, workers))


def test_torchrun_killed_outright_leaves_no_worker_and_what_was_saved_before(spawn, forty_windows, tmp_path):
    """The last save needs torchrun's store."""
    options = new(forty_windows, "standard", "--steps", 10**6, "--save-every", 5)
    child = torchrun(spawn, SCRIPT, *options, "--checkpoint-dir", tmp_path)
    child.expect(r"step \d+/")
    wait_until(lambda: list(tmp_path.glob("step_*.pt")))
    workers = worker_pids(child.pid)
    os.kill(child.pid, signal.SIGKILL)
    wait_until(lambda: not any(map(alive, workers)))
    assert whole_files(tmp_path) and t.latest_checkpoint(tmp_path)


@pytest.mark.campaign
def test_torchrun_restarts_from_the_last_sharded_save(spawn, forty_windows, tmp_path):
    child = torchrun(spawn, "--max-restarts=1", SCRIPT, *new(forty_windows, "standard"), "--checkpoint-dir", tmp_path,
                     "--steps", 60, "--save-every", 5, "--resume", "latest")
    child.expect(r"step 1\d/")
    os.kill(worker_pids(child.pid)[1], signal.SIGKILL)
    text = finish(child)
    assert re.search(r"Resumed at step \d+ of 60", text), text
    assert child.exitstatus == 0 and "All steps done" in text
