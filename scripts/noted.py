"""Runs a script as it is, and notes a digest of each batch, for check_resume.py.

    scripts/noted.py NOTES HOLD mine.py [options of mine.py]

In step HOLD (-1: in none) the loop waits until it is asked to leave, a minute at most.
"""

import csv
import hashlib
import io
import os
import pickle
import runpy
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils._pytree import keystr, tree_leaves_with_path

# The kinds of things that a record has, in the order of cause and effect.
BATCH, RATE, LOGGED, VALUE, KEPT = range(5)
# The step of what the last checkpoint holds, and how the names of what is kept begin there.
END = 10**12
STATE_DICTS = "checkpoint['state_dicts']"
# The step of the weights that a run begins with, and then ends with.
WEIGHTS = -1


class Content(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        """Of a tensor the values: pickle would add an address."""
        if not isinstance(value, torch.Tensor):
            return None
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return str(value.dtype), tuple(value.shape), data.tobytes()


def digest(value: object) -> str:
    buffer = io.BytesIO()
    Content(buffer).dump(value)
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


def read_notes(folder: Path) -> list[tuple[int, str]]:
    """The steps and digests that a run has noted; WEIGHTS are among the steps."""
    lines = Path(f"{folder}.notes").read_text().splitlines()
    return [(int(step), content) for step, content in map(str.split, lines)]


def record(folder: Path) -> dict[tuple[int, int, str], str]:
    """What a run was: {(step, kind of thing, name): content}."""
    batches = [note for note in read_notes(folder) if note[0] != WEIGHTS]
    found = {(step, BATCH, "the batch"): content for step, content in batches}
    for row in csv.DictReader((folder / "metrics.csv").open()):
        for name in row.keys() - {"samples_per_second", "seconds", "run"}:
            kind = {"lr": RATE, "val": VALUE}.get(name.partition("_")[0], LOGGED)
            found[int(row["step"]), kind, name] = row[name]
    state = torch.load(folder / "final.pt", "cpu", weights_only=True)
    # These say which run it was, and not what it has learned.
    del state["run_id"], state["saved_at"], state["config"]
    del state["metrics"]["seconds"], state["metrics"]["sessions"]
    for path, value in tree_leaves_with_path(state):
        found[END, KEPT, "checkpoint" + keystr(path)] = digest(value)
    return found


def run(notes: str, hold: str, *script: str) -> None:
    sys.argv = list(script)
    sys.path[0] = os.path.dirname(os.path.abspath(script[0]))
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    import train_graceful as tg

    original = tg.Run.batches
    file = open(notes, "a", buffering=1)

    def noted(run: tg.Run, loop: Iterator) -> Iterator:
        try:
            for batch in loop:
                if not run.trained:
                    print(WEIGHTS, digest([*run.module.parameters()]), file=file)
                print(run.step + 1, digest(batch), file=file)
                patience = 60 if run.step == int(hold) else 0
                deadline = time.monotonic() + patience
                while not run.monitor.exit_requested and time.monotonic() < deadline:
                    time.sleep(0.005)
                yield batch
        finally:
            print(WEIGHTS, digest([*run.module.parameters()]), file=file)

    tg.Run.batches = lambda run, *args, **named: noted(run, original(run, *args, **named))
    if os.path.samefile(script[0], tg.__file__):
        tg.main(tg.train, None, **tg.OPTIONS)
    runpy.run_path(script[0], run_name="__main__")


if __name__ == "__main__":
    run(*sys.argv[1:])
