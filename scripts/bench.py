#!/usr/bin/env python3
"""Measures what a user may ask about speed, each figure beside its reference.

    make bench                                  everything, most of an hour on 2 cores
    make bench ARGS="--only saving hearing"     some sections
    make bench-peers                            with lightning and transformers beside us

Rounds of ours and of the reference alternate. Prints a Markdown table. Exit code 1 if a figure
misses what is wanted of it.
"""

import argparse
import dataclasses
import functools
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import bench_geometric
import bench_peers
from bench_tools import (
    NEVER,
    NO_SAVES,
    child,
    child_command,
    interleaved,
    terminal,
    when,
    when_gone,
    words,
)

import train_graceful as t

GIB = 2**30


@dataclasses.dataclass
class Figure:
    """A row: what was measured round by round, its reference, and the limit that is wanted.

    With a reference the verdict is on the median of the rounds' own ratios, ours / reference.
    """

    name: str
    unit: str
    ours: list[float]
    limit: float | None
    reference: list[float] | None = None

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.ours, self.reference or [])]

    @property
    def value(self) -> float:
        return statistics.median(self.ratios or self.ours)

    @property
    def good(self) -> bool:
        return self.limit is None or self.value <= self.limit

    def row(self) -> str:
        reference, ratio, unit = "", "", f" {self.unit}"
        if self.reference:
            reference, unit = spread(self.reference, self.unit), ""
            ratio = f"{self.value:.3f} ({min(self.ratios):.2f}-{max(self.ratios):.2f})"
        wanted, met = "", ""
        if self.limit is not None:
            wanted = f"≤ {self.limit:g}{unit}"
            met = "yes" if self.good else "**no**"
        cells = [self.name, spread(self.ours, self.unit), reference, ratio, wanted, met]
        return f"| {' | '.join(cells)} |"


def spread(values: Sequence[float], unit: str) -> str:
    """Median (smallest-largest) unit."""

    def short(value: float) -> str:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

    middle = short(statistics.median(values))
    if min(values) < max(values):
        middle += f" ({short(min(values))}-{short(max(values))})"
    return f"{middle} {unit}"


# ---- What does it cost beside a loop of my own? -----------------------------------------------

OURS = bench_peers.train_graceful, bench_peers.own_model
PEERS = bench_peers.train_graceful, bench_peers.lightning, bench_peers.transformers


def loop(
    scale: float, folder: Path, trainers: Sequence = (), python: str = sys.executable
) -> Iterator[Figure]:
    for trainer in trainers or (*OURS, bench_peers.own_model_kept):
        place = folder / trainer.__name__
        measured = child(trainer, python, folder=place, blocks=max(3, round(21 * scale)))
        name = f"a step of {trainer.__doc__} / of a bare loop"
        limit = 1.02 if trainer in OURS else None
        yield Figure(name, "ms", measured["ours"], limit, measured["bare"])


# ---- How soon does it hear, and leave? --------------------------------------------------------


def listener() -> None:
    """Its main thread is always inside a long matrix product; every request is taken back."""

    class Forgetful(t.ExitMonitor):
        def request(self, reason: str, exit_code: int) -> None:
            super().request(reason, exit_code)
            self.withdraw()

    matrix, parent = torch.rand(4096, 4096), os.getppid()
    with Forgetful() as monitor:
        print("@ready", flush=True)
        while not monitor.save_requested and os.getppid() == parent:
            torch.mm(matrix, matrix)


def hearing(scale: float, folder: Path) -> Iterator[Figure]:
    process = terminal([sys.executable, *child_command(listener)])
    when(process, "@ready")

    def heard(ask: Callable[..., object], *arguments: object) -> float:
        # A person does not wait for the end of a matrix product.
        time.sleep(random.uniform(0.01, 0.04))
        started = time.perf_counter()
        ask(*arguments)
        return 1e3 * (when(process, "Exit requested!") - started)

    typed, signals = interleaved(
        round(200 * scale),
        lambda: heard(os.write, process.child_fd, b"q\n"),
        lambda: heard(os.kill, process.pid, signal.SIGTERM),
    )
    os.write(process.child_fd, b"s\n")
    when_gone(process)
    for request, milliseconds in (("q + Enter", typed), ("SIGTERM", signals)):
        name = f'{request} to "Exit requested", all cores in a matrix product'
        yield Figure(f"{name}: median", "ms", milliseconds, 5)
        slow = sorted(milliseconds)[int(0.99 * len(milliseconds))]
        yield Figure(f"{name}: 99th percentile", "ms", [slow], 20)


def leaving(scale: float, folder: Path) -> Iterator[Figure]:
    """Of the default model: the batch at hand, the save on leaving, the end of the process."""
    last_lines, prompts = [], []
    options = ["--steps", NEVER, *NO_SAVES, "--checkpoint-dir", folder]
    for _ in range(max(2, round(10 * scale))):
        process = terminal([sys.executable, ROOT / "train_graceful.py", *options])
        when(process, "step ")
        when(process, "step ")
        time.sleep(random.uniform(0, 0.1))
        started = time.perf_counter()
        os.write(process.child_fd, b"q\n")
        last_lines.append(when(process, "Resume with:") - started)
        prompts.append(when_gone(process) - started)
    yield Figure("q + Enter to the last line, the built-in model", "s", last_lines, None)
    yield Figure("q + Enter to the prompt, the built-in model", "s", prompts, None)


# ---- What does a save cost? -------------------------------------------------------------------


def saves_and_restores(folder: str, rounds: int, scale: float) -> list[list[float]]:
    """Seconds of our saves, of torch's, of our restores, of torch's; each on a quiet disk."""
    path = Path(folder, "saved.pt")
    model = torch.nn.ParameterList(torch.rand(round(GIB * scale / 31 / 4)) for _ in range(31))
    state = {"model": model.state_dict()}

    def torch_save() -> None:
        torch.save(state, path)
        t.flush_to_disk(path)

    def torch_restore() -> None:
        model.load_state_dict(torch.load(path, weights_only=True)["model"])

    def restore() -> None:
        model.load_state_dict(t.load_checkpoint(path, mmap=True)["model"])

    def timed(way: Callable[[], None]) -> float:
        os.sync()
        time.sleep(scale)
        started = time.perf_counter()
        way()
        return time.perf_counter() - started

    def timed_save(way: Callable[[], None]) -> float:
        path.unlink(missing_ok=True)
        return timed(way)

    def timed_restore(way: Callable[[], None]) -> float:
        # The file is cached.
        path.read_bytes()
        return timed(way)

    saves = (lambda: t.save_checkpoint(state, path)), torch_save
    seconds = interleaved(rounds, *(functools.partial(timed_save, way) for way in saves))
    restores = (functools.partial(timed_restore, way) for way in (restore, torch_restore))
    return seconds + interleaved(rounds, *restores)


def saving(scale: float, folder: Path) -> Iterator[Figure]:
    folder.mkdir()
    rounds = max(2, round(9 * scale))
    times = child(saves_and_restores, folder=folder, rounds=rounds, scale=scale)
    size = f"{scale:g} GiB in 31 tensors"
    name = f"save_checkpoint of {size} / torch.save and fsync"
    yield Figure(name, "s", times[0], 0.6, times[1])
    name = f"verified restore of {size}, the file cached / torch.load and a copy"
    yield Figure(name, "s", times[2], 0.6, times[3])


def saved_every_step(folder: str, block: int, rounds: int) -> dict:
    """Blocks of steps that save, and blocks of steps that do not, in turn."""
    steps: dict[str, list[float]] = {"with": [], "without": []}

    def train(run: t.Run) -> None:
        batches = run.batches

        def in_blocks(*arguments: object) -> Iterator:
            started = 0.0
            for number, batch in enumerate(batches(*arguments)):
                yield batch
                saves, place = number // (block + 1) % 2 == 0, number % (block + 1)
                run.options.save_every = 1 if saves else NEVER
                # The first is not measured: the last save of the block before may be under way.
                if place == 0:
                    started = time.perf_counter()
                elif place == block:
                    step = 1e3 * (time.perf_counter() - started) / block
                    steps["with" if saves else "without"].append(step)

        run.batches = in_blocks
        t.train(run)

    count = 2 * (rounds + 1) * (block + 1)
    given = ["--steps", count, *NO_SAVES, "--keep", 1, "--checkpoint-dir", folder]
    assert t.main(train, argv=words(given), **t.OPTIONS).completed
    return {name: values[1:] for name, values in steps.items()}


def every_step(scale: float, folder: Path) -> Iterator[Figure]:
    block, rounds = max(2, round(20 * scale)), max(2, round(12 * scale))
    measured = child(saved_every_step, folder=folder, block=block, rounds=rounds)
    name = "a step of the built-in model, saved after every step / without"
    yield Figure(name, "ms", measured["with"], None, measured["without"])


# ---- What is the geometric mode good for? ------------------------------------------------------


def convergence(scale: float, folder: Path) -> Iterator[Figure]:
    """Of runs whose schedules end where they end; one row in steps, one in time."""
    best, reached, steps = bench_geometric.steps_saved(scale, folder)
    name = f"the geometric mode's way to the loss of AdamW ({best}) / AdamW's"
    yield Figure(f"{name}, in steps", "steps", reached, 0.5, [steps] * len(reached))
    blocks = max(3, round(20 * scale))
    measured = child(bench_peers.geometric, folder=folder / "steps", blocks=blocks)
    geometric, bare = (statistics.median(measured[name]) / 1e3 for name in ("ours", "bare"))
    in_time = [geometric * count for count in reached]
    yield Figure(f"{name}, in time", "s", in_time, 0.575, [bare * steps] * len(reached))


# ---- All of it --------------------------------------------------------------------------------

QUESTIONS = (loop, hearing, leaving, saving, every_step, convergence)
SECTIONS: dict[str, Callable] = {section.__name__: section for section in QUESTIONS}


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--only", nargs="*", default=SECTIONS, choices=SECTIONS, help="sections")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: is the program whole?")
    parser.add_argument("--peers", metavar="PYTHON", help="one with lightning and transformers")
    parser.add_argument("--dir", default=ROOT / "checkpoints", help="where to write, on a disk")
    arguments = parser.parse_args()
    scale = 0.02 if arguments.quick else 1
    sections = {name: SECTIONS[name] for name in arguments.only}
    if arguments.peers:
        sections["peers"] = functools.partial(loop, trainers=PEERS, python=arguments.peers)
    all_good = True
    print(f"On {os.cpu_count()} cores, with PyTorch {torch.__version__}:\n")
    print("| figure | ours | reference | ratio | wanted | met |\n|---|---|---|---|---|---|")
    for name, section in sections.items():
        with tempfile.TemporaryDirectory(prefix="bench_", dir=arguments.dir) as folder:
            for figure in section(scale, Path(folder, name).absolute()):
                print(figure.row(), flush=True)
                all_good &= figure.good
    return not arguments.quick and not all_good


if __name__ == "__main__":
    sys.exit(main())
