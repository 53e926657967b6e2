"""What the fault campaigns share: cases that are counted, small runs, and how one goes on."""

import contextlib
import functools
import traceback
from collections.abc import Callable
from pathlib import Path

import helpers as h

SMALL = "--context 8 --layers 1 --heads 1 --dim 8 --experts 1 --batch-size 2 --dropout 0.1".split()
SCHEDULE = "--steps 7 --save-every 2 --eval-every 3 --log-every 1 --keep 2".split()


class Campaign(contextlib.AbstractContextManager):
    """Counts cases, so that one that fails does not hide the next; reports at its end."""

    def __init__(self, what: str) -> None:
        self.what, self.cases, self.failures = what, 0, []

    def case(self, name: object, body: Callable, *args) -> None:
        self.cases += 1
        try:
            body(*args)
        except Exception:
            self.failures.append(f"{name}: {traceback.format_exc()}")

    def __exit__(self, kind, *rest) -> None:
        if kind is None:
            h.TABLE.append((self.what, self.cases, len(self.failures)))
            assert self.cases and not self.failures, "\n".join(self.failures[:5])


def waiting(fork, moment: h.Moment, *words: object, **how) -> h.Child:
    """One that has come to this moment, and waits there for go()."""
    child = fork(*words, plan=[(moment, None)], **how)
    child.paused()
    return child


def undisturbed(folder: Path, *options: object, windows: int = 70, context: int = 8) -> Callable:
    """get(mode, *more options): all options, and the directory of the run with them, made once."""
    corpus = h.corpus_of(folder / "corpus.txt", windows, context)

    @functools.cache
    def get(mode: str, *more: object) -> tuple[list, Path]:
        every = ["--data", corpus, *SMALL, "--context", context, *options, *h.MODES[mode], *more]
        directory = folder / f"{mode}-{len(more)}"
        h.ended(h.Child(*every, "--checkpoint-dir", directory))
        return every, directory

    return get


def comes_to_the_same_end(fork, directory: Path, reference: Path) -> str:
    """Resumed, it is the run that nobody disturbed; what it printed."""
    output = h.ended(fork("--resume", "latest", "--checkpoint-dir", directory))
    h.assert_same_run(directory, reference)
    return output
