"""--shard: every rank has a part of the model, rank 0 saves all of it, any number goes on."""

import ctypes
import errno
import os
import re
import signal

import helpers as h
import pytest
import torch
from torch import nn

import train_graceful as t


def nothing(frame) -> None:
    pass


def no_room(frame) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def new(forty_windows):
    """new(mode, *options): a run of the built-in program that shares its model out."""

    def new(mode: str, *options: object) -> list:
        return [*h.OPTIONS, *h.MODES[mode], "--data", forty_windows, "--shard", *options]

    return new


# ---- the same run, however many have a part of it


def test_a_run_goes_on_on_any_number_of_ranks_sharded_or_not(
    ended, new, fork, float32_muon, tmp_path
):
    """Without a word of conversion: the next command line only says how many processes there are.

    One process alone shares nothing out, which does not keep those after it from that.
    """
    arguments, resumed = new("geometric", "--steps", 16), ["--resume", "latest"]
    ended("whole", 1, *arguments, "--no-shard")
    stop = [(h.Moment("complete", event="return"), h.frame_asks_to_leave)]
    for size, way in (1, "--shard"), (2, "--no-shard"), (4, "--shard"):
        ended("moved", size, *arguments, way, code=143, plans={0: stop})
        arguments = resumed
    alone = fork(*resumed, "--checkpoint-dir", tmp_path / "moved", plan=stop)
    path = h.saved_path(alone.finish())
    assert alone.exitcode == 143 and t.load_checkpoint(path)["config"]["shard"]
    # Shared out again: the stop comes only after something was gathered.
    ended("moved", 2, *resumed, code=143, plans={0: [(h.Moment("gather"), nothing), *stop]})
    ended("moved", 4, *resumed, "--no-shard")
    h.assert_close_run(tmp_path / "moved", tmp_path / "whole")


def layers_in_two_lists() -> nn.Module:
    model = h.Residual()
    model.again = nn.ModuleList([model.layers[1]])
    return model


OWN = {"mlp": (h.classify(lambda: h.mlp(dropout=0.0)), 4), "halves": (h.train_halves, 2)}
OWN["layers"] = (h.classify(layers_in_two_lists), 2)


@pytest.mark.parametrize("train, size", OWN.values(), ids=OWN)
def test_a_model_of_ones_own_trains_as_without_shard(ended, tmp_path, train, size):
    """Four share out its ten rows unequally; a layer that is in two lists is one unit."""
    ended("plain", size, program=h.program(train))
    ended("shared", size, "--shard", program=h.program(train))
    h.assert_close_run(tmp_path / "shared", tmp_path / "plain")


def test_no_rank_but_the_one_that_saves_has_the_whole_model(group, new, tmp_path):
    """Peak memory while it starts, trains, evaluates, saves, resumes; rank 0 alone gathers all."""

    def as_of_a_large_model(frame) -> None:
        # Of tensors this small glibc's heap keeps most of what it once held; of large ones nothing.
        ctypes.CDLL(None).mallopt(-3, 256 * 1024)

    def peak(size: int, *options: object) -> int:
        plans = {rank: [(h.Moment("train"), as_of_a_large_model)] for rank in range(size)}
        ranks = group(size, *options, "--checkpoint-dir", tmp_path / str(size), plans=plans)
        assert h.finished(ranks)[1] == [0] * size
        return ranks[-1].peak * 1024

    once = "--steps 1 --save-every 1 --eval-every 1 --log-every 1".split()
    small = peak(1, *new("geometric", *once))
    options = new("geometric", *once, *"--dim 256 --heads 4 --layers 4".split())
    # In bytes; as much for gradients, more for momentum, moments and the copy that is saved.
    weights = 4 * 4 * 12 * 256**2
    one = peak(1, *options) - small
    assert one > 3 * weights
    for each in (options, ["--resume", tmp_path / "4" / "step_1.pt", "--steps", 2]):
        four = peak(4, *each) - small
        assert four < 0.6 * one, (one, four, weights)


# ---- stops and saves


def test_s_typed_saves_what_all_ranks_hold(group, new, tmp_path):
    ranks = group(2, *new("standard", "--steps", 10**6), "--checkpoint-dir", tmp_path)
    for typed, said in (("s", "Checkpoint saved: "), ("q", "Emergency checkpoint saved: ")):
        ranks[0].terminal.expect(r"step \d+/")
        ranks[0].terminal.send(f"{typed}\n")
        ranks[0].terminal.expect(said)
    assert h.finished(ranks)[1] == [0, 0]


@pytest.mark.parametrize("where", ["write", "evaluate", "gather"])
def test_a_request_in_the_middle_of_a_save_or_an_evaluation(group, new, tmp_path, where):
    """Leaving waits for the file that is written."""
    plans = {0: [(h.Moment("complete", 3), nothing), (h.Moment(where), None)]}
    ranks = group(2, *new("geometric"), "--checkpoint-dir", tmp_path, plans=plans)
    ranks[0].paused()
    if where == "write":
        # In a thread; the row of step 4 comes all the same.
        h.wait_until(lambda: len(h.metrics_without_times(tmp_path)) > 3)
    ranks[1].kill(signal.SIGTERM)
    ranks[0].kill(signal.SIGTERM)
    ranks[0].terminal.expect("Exit requested")
    ranks[0].go()
    texts, codes = h.finished(ranks)
    assert codes == [143, 143] and "Emergency checkpoint saved" in texts[0], texts
    assert h.whole_files(tmp_path).keys() > {"step_3.pt"} and not list(tmp_path.rglob(".*tmp"))


NO_ROOM = [("--shard", "write", "q\n", "❌ Emergency checkpoint")]
NO_ROOM += [(way, "copy", "s\n", "step_[0-9]+.pt") for way in ("--shard", "--no-shard")]


@pytest.mark.parametrize("way, function, key, what", NO_ROOM)
def test_a_disk_or_memory_that_is_full_ends_no_training(
    group, new, tmp_path, way, function, key, what
):
    arguments = new("standard", *h.ENDLESS, way, "--checkpoint-dir", tmp_path)
    ranks = group(2, *arguments, plans={0: [(h.Moment(function), no_room)]})
    ranks[0].terminal.expect(r"step \d+/")
    ranks[0].terminal.send(key)
    ranks[0].terminal.expect(f"{what} not saved: No space left on device. Training goes on")
    assert not list(tmp_path.rglob("*.pt*"))
    ranks[0].terminal.expect(r"step \d+/")
    ranks[0].terminal.send("q\n")
    texts, codes = h.finished(ranks)
    assert codes == [0, 0] and "Graceful exit completed" in texts[0]
    assert len(h.whole_files(tmp_path)) == 1


# ---- damage and mistakes


def test_damage_is_found_by_all_ranks_together_and_skipped_by_latest(ended, new, tmp_path):
    ended("ck", 2, *new("geometric"))
    whole = tmp_path / "ck" / "final.pt"
    h.flip_a_weight(whole, tmp_path / "flipped.pt")
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:-5000])
    for name, words in [("flipped", "damaged checkpoint .record"), ("cut", "damaged, or not a")]:
        for text in ended("ck", 2, "--resume", tmp_path / f"{name}.pt", code=2):
            assert re.fullmatch(rf"error: {tmp_path}/{name}.pt: {words}.*\r\n", text)
    for path in (whole, tmp_path / "ck" / "best.pt"):
        h.flip_a_weight(path, path)
    texts = ended("ck", 2, "--resume", "latest")
    assert "Resumed at step 6 of" in texts[0] and not texts[1]
    assert f"⚠️ Skipped {whole}: damaged" in texts[0]
    assert h.whole_files(tmp_path / "ck")["final.pt"] == h.STEPS


def with_a_scalar() -> nn.Module:
    model = h.Residual()
    model.temperature = nn.Parameter(torch.tensor(1.0))
    return model


def test_mistakes_and_what_cannot_be_sharded_get_a_line_that_says_what_to_do(ended, new, tmp_path):
    message = "--shard needs processes: scripts/train_torchrun.sh 2 --shard"
    assert message in h.refused(*new("standard"))
    own = {"program": h.program(h.classify(with_a_scalar))}
    for text in ended("own", 2, "--shard", code=2, **own):
        assert text.startswith("error: --shard: fully_shard doesn't support scalar parameters")
        assert text.count("\n") == 1
    assert not list(tmp_path.rglob("*.pt"))
