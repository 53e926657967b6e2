#!/usr/bin/env python3
"""Checks that a script goes on bit for bit after a stop, or says what differs first, and why.

The script runs straight, then with another number of workers, then in three parts: stopped by
SIGTERM, later by q at a random moment, resumed with other numbers of workers (unless --workers is
among its options). Exit code 0: the same; 1: something differs; 2: the script fails.
"""

import argparse
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import noted
import torch
from noted import BATCH, END, KEPT, LOGGED, RATE, VALUE

HINTS = {
    BATCH: "The loop changes the dataset, or that makes a generator late: __getitem__ may depend on"
    " its index and random numbers alone. A stream needs state_dict and load_state_dict.",
    RATE: "The learning rate is set by hand, from something that is not kept: compute it from"
    " run.step, or run.keep(scheduler=scheduler).",
    LOGGED: "The batches are the same. Something that the loop or a forward changes is in no"
    " checkpoint: an attribute (register_buffer saves it), a counter, a list of samples, a"
    " generator. run.keep(name=object) saves what the object's state_dict has.",
    VALUE: "The weights are the same. Something that evaluate alone uses is not kept, an EMA for"
    " instance: run.keep(ema=ema). Or the validation data changes.",
    KEPT: "It is kept, but its state_dict or load_state_dict leaves something out.",
    "workers": "Each worker has a copy of the dataset: nothing may change it; generators are made"
    " in __init__. A script that depends on their number: --workers N behind its name.",
    "itself": "Look for the time, hash(), the order of a set, a generator without a seed, what is"
    " drawn outside of train(run), or a kernel that adds in no fixed order.",
}


# What the script itself has warned of.
warned: set[str] = set()


def session(what: str, folder: Path, words: list, stop: int = -1, key: float | None = None) -> None:
    """Runs the script. After step `stop` it gets SIGTERM, or q, `key` seconds later."""
    print(what, end=": ", flush=True)
    hold = stop if key is None else stop + 2
    command = [sys.executable, noted.__file__, f"{folder}.notes", hold, *words]
    command += ["--checkpoint-dir", folder, "--log-every", 1]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    texts = {"text": True, "encoding": "utf-8", "errors": "replace", "bufsize": 1}
    said, begun = [], time.monotonic()
    # In a session of its own it hears no Ctrl-C, and can be ended with all that it has started.
    kwargs = {"start_new_session": True, "env": {**os.environ, "TMPDIR": str(folder.parent)}}
    child = subprocess.Popen([*map(str, command)], **pipes, **texts, **kwargs)
    try:
        for line in child.stdout:
            said.append(line)
            row = re.search(r"\bstep (\d+)/", line)
            if row and 0 < stop <= int(row[1]):
                stop = -1
                if key is None:
                    child.terminate()
                else:
                    time.sleep(key)
                    print("q", file=child.stdin)
        child.communicate()
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        raise
    warned.update(line.strip() for line in said if line.startswith("⚠️"))
    done = re.findall(r"Completed Steps: (\d+)", "".join(said))
    print(f"{done[-1] if done else 'no'} steps, {time.monotonic() - begun:.0f} s", flush=True)
    if child.returncode == 0 and not list(folder.rglob("*.pt")):
        print("It saves elsewhere: this needs a script whose main() reads the command line.")
        sys.exit(2)
    if child.returncode not in (0, 128 + signal.SIGTERM) or not done:
        print("".join(said[-15:]), f"It has not ended well: exit code {child.returncode}.", sep="")
        sys.exit(2)


def difference(one: dict, other: dict) -> tuple[str, int] | None:
    """What differs first between two runs, in words, and its kind; None where nothing does."""
    keys = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    if not keys:
        return None
    step, kind, name = keys[0]
    text = f"{name} differs from step {step} on"
    if kind == BATCH and not (one.get(keys[0]) and other.get(keys[0])):
        text, kind = f"one ends before step {step}", LOGGED
    last = [name for step, _, name in keys if step == END]
    if step == END:
        text = f"in the last checkpoint differ {', '.join(last[:3])} ({len(last)} values in all)"
    learned = re.search("model_state_dict|optimizer_state_dicts", " ".join(last))
    if learned and kind in (VALUE, KEPT):
        kind = LOGGED
    kept = {name.split("'")[3] for _, _, name in one if name.startswith(noted.STATE_DICTS)}
    if kind == LOGGED and kept:
        text += f" (is all that counts in the state_dict of {', '.join(sorted(kept))}?)"
    return text, kind


def check(script: list[str], steps: int, chance: random.Random, folder: Path) -> str:
    """Runs the script as often as it takes. Returns what differs, and why; "" for nothing."""
    words = [script[0], "--steps", steps, "--eval-every", max(1, steps // 4), *script[1:]]
    whole, other, again, parts = (folder / name for name in ("whole", "other", "again", "parts"))
    session("straight", whole, words)
    straight = noted.record(whole)
    state = torch.load(whole / "final.pt", "cpu", weights_only=True)
    if len({content for step, content in noted.read_notes(whole) if step == noted.WEIGHTS}) == 1:
        print("⚠️ The weights have not changed: this proves nothing. More --steps may.")
    counts = [["--workers", n] for n in (3, 1, 0) if n != state["config"]["workers"]]
    if any(word.partition("=")[0] == "--workers" for word in script):
        counts = [[], []]
    session("straight, other workers", other, words + counts[0])
    if found := difference(straight, noted.record(other)):
        session("straight again", again, words)
        if itself := difference(straight, noted.record(again)):
            return f"Two equal runs: {itself[0]}.\n   {HINTS['itself']}"
        return f"With other workers: {found[0]}.\n   {HINTS['workers']}"
    if state["step"] < 7:
        print(f"{state['step']} steps are too few to stop in them twice.")
        sys.exit(2)
    # The second stop may come two steps later, and one step is left for the third part.
    first, second = sorted(chance.sample(range(1, state["step"] - 4), 2))
    # At any moment of two steps, in an evaluation or while it waits for the loader.
    key = chance.uniform(0, 2 * state["metrics"]["seconds"] / state["step"])
    session(f"SIGTERM after step {first}", parts, words, first)
    go_on = [script[0], "--resume", "latest"]
    what = f"resumed, q {key:.3f} s after step {second + 1}"
    session(what, parts, go_on + counts[1], second + 1, key)
    # It may have ended earlier than the straight run.
    if not (ended := (parts / "final.pt").exists()):
        session("resumed", parts, go_on + counts[0])
    if found := difference(straight, noted.record(parts)):
        return f"Stopped and resumed: {found[0]}.\n   {HINTS[found[1]]}"
    return "It was asked to leave, but has not left" if ended else ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the stops")
    parser.add_argument("script")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of the script")
    given = parser.parse_args(argv)
    if not os.path.isfile(given.script):
        parser.error(f"{given.script} is no file")
    script = [given.script, *given.options]
    with tempfile.TemporaryDirectory() as folder:
        found = check(script, given.steps, random.Random(given.seed), Path(folder))
    if not found:
        print("✅ The same bits: batches, metrics.csv, and all that the last checkpoint holds.")
        return 0
    again = [sys.executable, __file__, "--steps", given.steps, "--seed", given.seed, *script]
    print(f"❌ {found}", *sorted(warned), sep="\n   ")
    print(f"   The same check again: {shlex.join(map(str, again))}")
    return 1


if __name__ == "__main__":
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, lambda signum, frame: sys.exit(128 + signum))
    sys.exit(main())
