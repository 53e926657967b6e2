"""The examples for other loops, trainers and trackers leave on q + Enter and go on."""

import csv
import os
import runpy
import signal
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import helpers as h
import pytest
import torch

import train_graceful as t

EXAMPLES = h.ROOT / "scripts" / "examples"


@pytest.fixture
def example(spawn, tmp_path):
    """example(name, ...) runs that example in a terminal, in an empty folder; again in the same."""

    def start(name: str, *arguments: object):
        return spawn(*arguments, script=EXAMPLES / name, cwd=tmp_path)

    return start


def test_the_plain_loop_saves_on_s_and_q_and_goes_on(example, tmp_path):
    steps = []

    def saved(child) -> None:
        child.expect(r"Saved mine.pt at step (\d+)")
        steps.append(int(child.match[1]))

    child = example("plain_loop.py")
    # Heard as soon as there is a monitor.
    child.sendline("s")
    saved(child)
    child.sendline("q")
    saved(child)
    assert "Left because of user_requested_graceful_exit" in h.finish(child)
    assert child.exitstatus == 0 and steps[1] == t.load_checkpoint(tmp_path / "mine.pt")["step"]
    child = example("plain_loop.py", "mine.pt")
    child.sendline("s")
    saved(child)
    child.kill(15)
    assert "Left because of signal_SIGTERM" in h.finish(child)
    assert child.exitstatus == 143 and steps[0] <= steps[1] < steps[2]


def needs(package: str) -> None:
    pytest.importorskip(package, reason=f"{package} is missing: make test-integrations")


TRAINERS = [
    ("transformers", "huggingface.py", "hf_checkpoints/checkpoint-*"),
    ("lightning", "lightning_trainer.py", "lightning.ckpt"),
]


@pytest.mark.parametrize("package, name, saved", TRAINERS)
def test_a_trainer_leaves_on_q_with_a_checkpoint_and_goes_on(
    example, tmp_path, package, name, saved
):
    needs(package)
    steps = []
    for _ in range(2):
        child = example(name)
        # Heard as soon as there is a monitor; the trainer then ends after its first step.
        child.sendline("q")
        child.expect(r"Left at step (\d+) because of user_requested_graceful_exit")
        steps.append(int(child.match[1]))
        h.finish(child)
        assert child.exitstatus == 0 and list(tmp_path.glob(saved))
    assert 1 <= steps[0] < steps[1]


def test_accelerate_leaves_on_q_with_a_checkpoint_and_goes_on(example, tmp_path):
    needs("accelerate")
    steps = []
    for epoch in ("Epoch 1", "Epoch 0"):
        child = example("accelerate_loop.py")
        child.expect(epoch)
        child.sendline("q")
        child.expect("Left because of user_requested_graceful_exit")
        h.finish(child)
        state = torch.load(tmp_path / "accelerate_checkpoint" / "optimizer.bin")["state"]
        steps.append(state[0]["step"])
        assert child.exitstatus == 0
    assert 125 <= steps[0] < steps[1]


Points = dict[tuple[str, int], list[float]]


def tensorboard_points(folder: Path) -> Points:
    """What TensorBoard shows: {(curve, step): values}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [written] = folder.glob("tensorboard_*")
    events = EventAccumulator(str(written), {"scalars": 0}).Reload()
    points: Points = {}
    for name in events.Tags()["scalars"]:
        for point in events.Scalars(name):
            points.setdefault((name, point.step), []).append(point.value)
    return points


def records(path: Path) -> Iterator[bytes]:
    """Of an offline file of W&B, in the format of LevelDB's logs; the last may be cut short."""
    data, place, record = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while place + 7 <= len(data):
        # What is too short for a header ends a block.
        if (rest := -place % 32768) and rest < 7:
            place += rest
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        # Whole, or the last part of one.
        if kind in (1, 4):
            yield record
            record = b""


def wandb_points(folder: Path) -> Points:
    """What all offline files of a run have: {(curve, step): values}."""
    from wandb.proto.wandb_internal_pb2 import Record

    points: Points = {}
    for path in folder.rglob("*.wandb"):
        for record in map(Record.FromString, records(path)):
            for item in record.history.item:
                name = item.key or item.nested_key[0]
                # W&B's own begin like this.
                if not name.startswith("_"):
                    point = points.setdefault((name, record.history.step.num), [])
                    point.append(float(item.value_json))
    return points


TRACKERS = [("log_tensorboard.py", tensorboard_points), ("log_wandb.py", wandb_points)]


@pytest.mark.parametrize("by", ["q", "SIGKILL"])
@pytest.mark.parametrize("name, points_in", TRACKERS)
def test_a_tracker_has_each_row_once_however_the_run_was_stopped(
    fork, tmp_path, name, points_in, by
):
    needs(name[4:-3])
    folder, came_again = tmp_path / "checkpoints", 0

    def begin() -> None:
        os.chdir(tmp_path)
        sys.argv[0] = str(EXAMPLES / name)
        runpy.run_path(sys.argv[0], run_name="__main__")

    def rows() -> list[dict[str, str]]:
        with open(folder / "metrics.csv") as file:
            return list(csv.DictReader(file))

    def start(*options: str, **how):
        return fork(*options, program=begin, WANDB_MODE="offline", **how)

    options = "--save-every", "25"
    for nth in 78, 41:
        child = start(*options, plan=[(h.Moment("complete", nth), None)])
        child.paused()
        if by == "q":
            child.terminal.sendline("q")
            child.terminal.expect("Exit requested!")
            child.go()
            child.finish()
            assert child.exitcode == 0
        else:
            h.wait_until(lambda: list(folder.glob("step_*.pt")))
            child.kill(signal.SIGKILL)
            child.finish()
            known = t.load_checkpoint(t.latest_checkpoint(folder))["step"]
            came_again += sum(int(row["step"]) > known for row in rows())
        options = "--resume", "latest"
        # The order of TensorBoard's files is that of the seconds in their names.
        second = int(time.time())
        h.wait_until(lambda: time.time() >= second + 1)
    child = start(*options)
    child.finish()
    assert child.exitcode == 0 and bool(came_again) == (by == "SIGKILL")
    wanted = {
        (name, int(row["step"])): float(value)
        for row in rows()
        for name, value in row.items()
        if value and name != "run"
    }
    assert len({step for _, step in wanted}) == 40
    points = points_in(folder)
    assert points.keys() == wanted.keys()
    for key, values in points.items():
        assert values == [pytest.approx(wanted[key], rel=1e-6)], key
