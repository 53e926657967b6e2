"""An example goes on bit for bit when it was left, and does what its recipe promises."""

import os
import re
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import helpers as h
import pytest

import train_graceful as t

EXAMPLES = h.ROOT / "scripts" / "examples"


def program(name: str, folder: Path) -> Callable[[], object]:
    """What a child does to be the example, started in that folder."""

    def start() -> None:
        os.chdir(folder)
        sys.argv[0] = str(EXAMPLES / name)
        runpy.run_path(sys.argv[0], run_name="__main__")

    return start


def left(child: h.Child, by: str) -> str:
    """Asks a child that has come to its moment to leave, and waits for its end."""
    child.paused()
    if by == "q":
        child.terminal.sendline("q")
    else:
        child.kill(signal.SIGTERM)
    child.terminal.expect("Exit requested!")
    child.go()
    return h.ended(child, 0 if by == "q" else 128 + signal.SIGTERM)


def finds_the_rare_class(straight: Path, parts: Path) -> None:
    assert h.final(parts)["evaluation"]["values"]["f1"] > 0.9
    # In batches of any lengths it would be 0.45.
    assert max(h.column(parts, "padding")) < 0.2


def draws_a_picture_each_epoch(straight: Path, parts: Path) -> None:
    names = [f"epoch_{number}.pgm" for number in range(1, 6)]
    for folder in straight, parts:
        assert sorted(os.listdir(folder / "pictures")) == names
    drawn = [(straight / "pictures" / name).read_bytes() for name in names]
    assert drawn == [(parts / "pictures" / name).read_bytes() for name in names]
    assert len({*drawn}) == 5


def thaws_and_stops_early(straight: Path, parts: Path) -> None:
    state = h.final(parts)
    assert 40 < state["best"]["step"] == state["step"] - state["config"]["patience"]
    # At the first stop the head had learned alone, at the second one all.
    states = map(t.load_checkpoint, (parts / "emergency_exit").iterdir())
    assert {len(one["optimizer_state_dicts"]["optimizer"]["state"]) for one in states} == {2, 6}


def learns_to_walk(straight: Path, parts: Path) -> None:
    rewards = h.column(parts, "reward")
    assert len(rewards) == 10 and sum(rewards[-3:]) > 3 * sum(rewards[:3])


# Where it is stopped, by q, then by SIGTERM; what its recipe promises beyond that.
PROMISES = [
    ("text_buckets.py", [100], finds_the_rare_class),
    # An evaluation is due, and a picture.
    ("ema_pictures.py", [20, 32], draws_a_picture_each_epoch),
    # The body is frozen; half of the patience has gone by.
    ("finetune.py", [30, 260], thaws_and_stops_early),
    ("reinforcement.py", [60], learns_to_walk),
    ("stream.py", [60], None),
    ("sam.py", [60], None),
]


@pytest.mark.parametrize("name, stops, promise", PROMISES)
def test_an_example_that_was_left_is_the_run_that_was_never_stopped(
    fork, tmp_path, name, stops, promise
):
    begin, straight, parts = program(name, tmp_path), tmp_path / "straight", tmp_path / "parts"
    h.ended(fork("--checkpoint-dir", straight, program=begin))
    options, done = ["--checkpoint-dir", parts], 0
    for stop, by in zip(stops, ["q", "SIGTERM"]):
        left(fork(*options, program=begin, plan=[(h.Moment("complete", stop - done), None)]), by)
        options, done = ["--checkpoint-dir", parts, "--resume", "latest"], stop
    h.ended(fork(*options, program=begin))
    h.assert_same_run(straight, parts)
    if promise is not None:
        promise(straight, parts)


def test_q_leaves_the_whole_sweep_and_the_same_command_goes_on_with_it(fork, tmp_path):
    def sweep_in(folder: str) -> Callable[[], object]:
        def start() -> None:
            os.chdir(tmp_path)
            sys.path.insert(0, str(EXAMPLES))
            from sweep import sweep

            sys.exit(sweep(8, folder))

        return start

    straight = h.ended(fork(program=sweep_in("straight")))
    pruned = re.findall(r"Trial (\d) is pruned", straight)
    assert 0 < len(pruned) < 7
    for by in "q", "SIGTERM":
        said = left(fork(program=sweep_in("parts"), plan=[(h.Moment("complete", 80), None)]), by)
        begun = sorted(os.listdir(tmp_path / "parts"))
        # None begins behind the one that was left.
        assert 0 < len(begun) < 8 and "🏁" not in said
        assert not (tmp_path / "parts" / begun[-1] / "final.pt").exists()
    parts = h.ended(fork(program=sweep_in("parts")))
    assert parts.splitlines()[-1] == straight.splitlines()[-1]
    assert "🏁" in straight.splitlines()[-1]
    for number in range(8):
        one, other = (tmp_path / folder / str(number) for folder in ("straight", "parts"))
        if str(number) not in pruned:
            h.assert_same_run(one, other)
        else:
            last = t.load_checkpoint(t.latest_checkpoint(other))
            assert (last["exit_reason"], last["step"]) == ("exception_Pruned", 32)


def test_the_page_of_examples_names_each_of_them():
    linked = set(re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text()))
    assert linked == {path.name for path in EXAMPLES.glob("*.py")}
