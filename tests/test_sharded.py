"""--shard: every rank has a part of the model, rank 0 saves all of it, any number goes on."""

import ctypes
import errno
import os
import re
import signal

import pytest
import torch
from helpers import (
    ENDLESS,
    MODES,
    OPTIONS,
    STEPS,
    Moment,
    Residual,
    assert_close_run,
    assert_same_run,
    classify,
    cnn,
    fail,
    finished,
    flip_a_weight,
    metrics_without_times,
    program,
    refused,
    saved_path,
    train_gan,
    wait_until,
    whole_files,
)
from torch import nn

import train_graceful as t


def send_sigterm(frame) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def no_room(frame) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def new(forty_windows):
    """new(mode, *options): a run of the built-in program that shares its model out."""

    def new(mode: str, *options: object) -> list:
        return [*OPTIONS, *MODES[mode], "--data", forty_windows, "--shard", *options]

    return new


@pytest.fixture
def started(group, tmp_path):
    """started("ck", 2, *options): so many ranks, which save in tmp_path / "ck"."""

    def started(folder: str, size: int, *options: object, **settings) -> list:
        return group(size, "--checkpoint-dir", tmp_path / folder, *options, **settings)

    return started


@pytest.fixture
def ended(started):
    """ended("ck", 2, *options, code=0): they have ended with that; what each has printed."""

    def ended(folder: str, size: int, *options: object, code: int = 0, **settings) -> list[str]:
        texts, codes = finished(started(folder, size, *options, **settings))
        assert codes == [code] * size, texts
        return texts

    return ended


# ---- the same run, however many have a part of it


def test_a_run_goes_on_on_any_number_of_ranks_sharded_or_not(
    ended, new, fork, float32_muon, tmp_path
):
    """Without a word of conversion: the next command line only says how many processes there are.

    One process alone shares nothing out, which does not keep those after it from that.
    """
    arguments, resumed = new("geometric", "--steps", 16), ["--resume", "latest"]
    ended("whole", 1, *arguments, "--no-shard")
    stop = [(Moment("complete", event="return"), send_sigterm)]
    for size, way in (1, "--shard"), (2, "--no-shard"), (4, "--shard"):
        ended("moved", size, *arguments, way, code=143, plans={0: stop})
        arguments = resumed
    alone = fork(*resumed, "--checkpoint-dir", tmp_path / "moved", plan=stop)
    path = saved_path(alone.finish())
    assert alone.exitcode == 143 and t.load_checkpoint(path)["config"]["shard"]
    # Shared out again: the stop comes only after something was gathered.
    gathered = [(Moment("gather"), lambda frame: None)]
    ended("moved", 2, *resumed, code=143, plans={0: [*gathered, *stop]})
    ended("moved", 4, *resumed, "--no-shard")
    assert_close_run(tmp_path / "moved", tmp_path / "whole")


def layers_in_two_lists() -> nn.Module:
    model = Residual()
    model.again = nn.ModuleList([model.layers[1]])
    return model


OWN = {"cnn": classify(lambda: cnn(dropout=0.0)), "gan": train_gan}
OWN["layers"] = classify(layers_in_two_lists)


@pytest.mark.parametrize("model, size", [("cnn", 4), ("gan", 2), ("layers", 2)])
def test_a_model_of_ones_own_trains_as_without_shard(ended, tmp_path, model, size):
    """Four share out the CNN's ten rows unequally; a layer that is in two lists is one unit."""
    own = {"program": program(OWN[model])}
    ended("plain", size, **own)
    ended("shared", size, "--shard", **own)
    assert_close_run(tmp_path / "shared", tmp_path / "plain")


def test_no_rank_but_the_one_that_saves_has_the_whole_model(started, new, tmp_path):
    """Peak memory while it starts, trains, evaluates, saves, resumes; rank 0 alone gathers all."""

    def as_of_a_large_model(frame) -> None:
        # Of tensors this small glibc's heap keeps most of what it once held; of large ones nothing.
        ctypes.CDLL(None).mallopt(-3, 256 * 1024)

    def peaks(folder: str, size: int, *options: object) -> int:
        plans = {rank: [(Moment("train"), as_of_a_large_model)] for rank in range(size)}
        ranks = started(folder, size, *options, plans=plans)
        assert finished(ranks)[1] == [0] * size
        return max(rank.peak for rank in ranks[size > 1 :]) * 1024

    once = "--steps 1 --save-every 1 --eval-every 1 --log-every 1".split()
    small = peaks("small", 1, *new("geometric", *once))
    options = new("geometric", *once, *"--dim 256 --heads 4 --layers 4".split())
    # In bytes; as much for gradients, more for momentum, moments and the copy that is saved.
    weights = 4 * 4 * 12 * 256**2
    one = peaks("1", 1, *options) - small
    assert one > 3 * weights
    for each in (options, ["--resume", tmp_path / "1" / "step_1.pt", "--steps", 2]):
        four = peaks("4", 4, *each) - small
        assert four < one / 2, (one, four, weights)


# ---- stops and saves


def test_training_goes_on_while_rank_0_writes_and_leaving_waits_for_it(started, new, tmp_path):
    plans, folder = {0: [(Moment("write"), None)]}, tmp_path / "ck"
    ranks = started("ck", 2, *new("standard", *ENDLESS), plans=plans)
    ranks[0].terminal.expect(r"step \d+/")
    ranks[0].terminal.send("s\n")
    ranks[0].paused()
    begun = len(metrics_without_times(folder))
    wait_until(lambda: len(metrics_without_times(folder)) > begun + 20)
    assert not list(folder.glob("step_*"))
    ranks[0].terminal.send("q\n")
    ranks[0].terminal.expect("Saving emergency checkpoint")
    ranks[0].go()
    ranks[0].terminal.expect("Checkpoint saved: ")
    texts, codes = finished(ranks)
    assert codes == [0, 0] and len(list(folder.glob("step_*"))) == 1
    reason = t.load_checkpoint(saved_path(texts[0]))["exit_reason"]
    assert reason == "user_requested_graceful_exit"


@pytest.mark.parametrize("where", ["write", "evaluate", "gather"])
def test_a_request_in_the_middle_of_a_save_or_an_evaluation(started, new, tmp_path, where):
    plan = [(Moment("complete", 3), lambda frame: None), (Moment(where), None)]
    ranks = started("ck", 2, *new("geometric"), plans={0: plan})
    ranks[0].paused()
    ranks[1].kill(signal.SIGTERM)
    ranks[0].kill(signal.SIGTERM)
    ranks[0].terminal.expect("Exit requested")
    ranks[0].go()
    texts, codes = finished(ranks)
    assert codes == [143, 143] and "Emergency checkpoint saved" in texts[0], texts
    assert whole_files(tmp_path) and not list(tmp_path.rglob(".*tmp"))


NO_ROOM = [("write", "q\n", "❌ Emergency checkpoint")]
NO_ROOM += [("copy", "s\n", "step_[0-9]+.pt")]


@pytest.mark.parametrize("function, key, what", NO_ROOM)
@pytest.mark.parametrize("way", ["--shard", "--no-shard"])
def test_a_disk_or_memory_that_is_full_ends_no_training(
    started, new, tmp_path, function, key, what, way
):
    plans = {0: [(Moment(function), no_room)]}
    ranks = started("ck", 2, *new("standard", *ENDLESS, way), plans=plans)
    ranks[0].terminal.expect(r"step \d+/")
    ranks[0].terminal.send(key)
    ranks[0].terminal.expect(f"{what} not saved: No space left on device. Training goes on")
    assert not list(tmp_path.rglob("*.pt*"))
    ranks[0].terminal.expect(r"step \d+/")
    ranks[0].terminal.send("q\n")
    texts, codes = finished(ranks)
    assert codes == [0, 0] and "Graceful exit completed" in texts[0]
    assert len(whole_files(tmp_path)) == 1


# ---- failures and damage


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("function, nth", [("loss", 9), ("Muon", 5)])
def test_after_an_exception_nothing_is_saved_and_the_newest_whole_checkpoint_is_named(
    ended, new, tmp_path, rank, function, nth
):
    """The others' parts are out of reach. Resumed from there, it is the same run."""
    options, plans = new("geometric", "--dropout", 0.1), {rank: [(Moment(function, nth), fail)]}
    ended("whole", 2, *options)
    texts = ended("ck", 2, *options, code=1, plans=plans)
    assert "RuntimeError: injected" in texts[rank], texts
    assert "out of reach: nothing half-updated is saved" in texts[0]
    assert "Graceful exit completed" not in texts[0]
    assert not (tmp_path / "ck" / "emergency_exit").exists()
    newest = re.search(r"Newest whole checkpoint: (\S+/(?:step_3|best).pt)\r\n", texts[0])[1]
    step = t.load_checkpoint(newest)["step"]
    texts = ended("ck", 2, "--resume", newest)
    assert f"Resumed at step {step} of" in texts[0]
    assert_same_run(tmp_path / "ck", tmp_path / "whole")


def test_damage_is_found_by_all_ranks_together_and_skipped_by_latest(ended, new, tmp_path):
    ended("ck", 2, *new("geometric"))
    whole = tmp_path / "ck" / "final.pt"
    flip_a_weight(whole, tmp_path / "flipped.pt")
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:-5000])
    for name, words in [("flipped", "damaged checkpoint .record"), ("cut", "damaged, or not a")]:
        for text in ended("ck", 2, "--resume", tmp_path / f"{name}.pt", code=2):
            assert re.fullmatch(rf"error: {tmp_path}/{name}.pt: {words}.*\r\n", text)
    for path in (whole, tmp_path / "ck" / "best.pt"):
        flip_a_weight(path, path)
    texts = ended("ck", 2, "--resume", "latest")
    assert "Resumed at step 6 of" in texts[0] and not texts[1]
    assert f"⚠️ Skipped {whole}: damaged" in texts[0]
    assert whole_files(tmp_path / "ck")["final.pt"] == STEPS


# ---- mistakes


def with_a_scalar() -> nn.Module:
    model = Residual()
    model.temperature = nn.Parameter(torch.tensor(1.0))
    return model


def test_mistakes_and_what_cannot_be_sharded_get_a_line_that_says_what_to_do(ended, new, tmp_path):
    message = "--shard needs processes: scripts/train_torchrun.sh 2 --shard"
    assert message in refused(*new("standard"))
    own = {"program": program(classify(with_a_scalar))}
    for text in ended("own", 2, "--shard", code=2, **own):
        assert text.startswith("error: --shard: fully_shard doesn't support scalar parameters")
        assert text.count("\n") == 1
    assert not list(tmp_path.rglob("*.pt"))
    ended("ck", 1, *new("standard"))
    texts = ended("ck", 2, "--resume", tmp_path / "ck" / "step_6.pt", "--dim", 32, code=2)
    assert "--dim 32 does not fit the checkpoint" in texts[0]
