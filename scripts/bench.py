#!/usr/bin/env python3
"""Measures what a user may ask about speed, each figure beside its reference.

    make bench                                  everything, most of an hour on 2 cores
    make bench ARGS="--only saving resuming"    some sections
    make bench-peers                            with lightning, transformers and accelerate beside us

Rounds of ours and of the reference alternate. Prints a Markdown table and appends the same figures,
with what they were measured on, to a file of JSON lines. Exit code 1 if a figure misses what is
wanted of it.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "examples")]
import bench_bare
import bench_geometric
import bench_scaling
import own_model
from bench_tools import (
    NEVER,
    TINY,
    Terminal,
    child,
    child_command,
    interleaved,
    memory,
    seconds_to,
    until_line,
    words,
)

import train_graceful as t

MIB, GIB = 2**20, 2**30
NO_SAVES = ["--save-every", NEVER, "--eval-every", NEVER]
ENDLESS = ["--steps", NEVER, *NO_SAVES]


@dataclasses.dataclass
class Figure:
    """A row: what was measured round by round, its reference, and the limit that is wanted.

    With a reference the verdict is on the median of the rounds' own ratios, ours / reference.
    """

    name: str
    unit: str
    ours: list[float]
    limit: float
    reference: list[float] | None = None
    at_least: bool = False

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.ours, self.reference or [])]

    @property
    def value(self) -> float:
        return statistics.median(self.ratios or self.ours)

    @property
    def good(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def row(self) -> str:
        reference, ratio, unit = "", "", f" {self.unit}"
        if self.reference:
            reference, unit = spread(self.reference, self.unit), ""
            ratio = f"{self.value:.3f} ({min(self.ratios):.2f}-{max(self.ratios):.2f})"
        wanted = f"{'≥' if self.at_least else '≤'} {self.limit:g}{unit}"
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


def ours(*options: object) -> list[str]:
    return words([sys.executable, ROOT / "train_graceful.py", *options])


def trained(*options: object, **environment: str) -> None:
    """Runs the program to its end."""
    command, variables = ours(*options, "--no-keyboard"), {**os.environ, **environment}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=variables)


def first_batch(command: Sequence[object], batches: int = 1) -> tuple[float, float]:
    """Seconds from the start of a program to the end of its first batch; its peak memory, later."""
    return until_line(words([*command, *ENDLESS, "--log-every", 1]), "step ", batches)


# ---- What does it cost beside a loop of my own? -----------------------------------------------


def text_beside(folder: str, blocks: int, device: str) -> dict:
    clock = bench_bare.Clock(bench_bare.text_loop(t.ByteLM, device))

    def train(run: t.Run) -> None:
        clock.after_batches(run)
        t.train(run)

    given = ["--steps", 20 * (blocks + 1), *NO_SAVES, "--checkpoint-dir", folder]
    assert t.main(train, argv=words([*given, "--device", device]), **t.OPTIONS) == 0
    return clock.rates(16)


def cnn_beside(folder: str, blocks: int, workers: int) -> dict:
    bare = bench_bare.cnn_loop(own_model.Images, own_model.cnn, workers)
    clock = bench_bare.Clock(bare, every=60 if workers else 1)

    def train(run: t.Run) -> None:
        clock.after_batches(run)
        own_model.train(run)

    steps = (blocks + 1) * max(20, clock.every)
    given = ["--steps", steps, *NO_SAVES, "--workers", workers, "--checkpoint-dir", folder]
    assert t.main(train, argv=words(given), lr=3e-3, weight_decay=0.05, batch_size=64) == 0
    return clock.rates(64)


def loop(scale: float, folder: Path) -> Iterator[Figure]:
    blocks, example = max(3, round(20 * scale)), "scripts/examples/own_model.py"
    rows = {
        "the built-in model": (text_beside, {"device": "cpu"}),
        example: (cnn_beside, {"workers": 0}),
        f"{example} with 2 workers": (cnn_beside, {"workers": 2}),
    }
    if torch.cuda.is_available():
        rows["the built-in model on the GPU"] = (text_beside, {"device": "cuda"})
    for number, (what, (function, settings)) in enumerate(rows.items()):
        measured = child(function, folder=folder / str(number), blocks=blocks, **settings)
        name = f"training of {what} / a bare loop"
        yield Figure(name, "samples/s", measured["ours"], 0.98, measured["bare"], at_least=True)


def start(scale: float, folder: Path) -> Iterator[Figure]:
    model = (t.Attention, t.Experts, t.Block, t.ByteLM)
    bare_text = bench_bare.command(model, bench_bare.text_loop, "ByteLM")
    own = (own_model.Images, own_model.cnn)
    bare_cnn = bench_bare.command(own, bench_bare.cnn_loop, "Images, cnn, 2")
    cnn = [sys.executable, own_model.__file__, "--checkpoint-dir", folder / "cnn"]
    text, text_by_hand, images, images_by_hand = interleaved(
        max(2, round(11 * scale)),
        lambda: first_batch(ours("--checkpoint-dir", folder / "text"))[0],
        lambda: until_line(bare_text, "step ")[0],
        lambda: first_batch(cnn)[0],
        lambda: until_line(bare_cnn, "step ")[0],
    )
    name = "from the start to the end of the first batch,"
    yield Figure(f"{name} the built-in model / a bare script", "s", text, 1.2, text_by_hand)
    what = "scripts/examples/own_model.py, 2 workers"
    yield Figure(f"{name} {what} / a bare script", "s", images, 1.2, images_by_hand)


# ---- How soon does it leave? ------------------------------------------------------------------


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
    terminal = Terminal([sys.executable, *child_command(listener, os.devnull)])
    terminal.wait_for("@ready")
    fd, pid = terminal.process.fd, terminal.process.pid

    def heard(ask: Callable[..., object], *arguments: object) -> float:
        # A person does not wait for the end of a matrix product.
        time.sleep(0.01 + 0.03 * (time.perf_counter_ns() % 1000) / 1000)
        started = time.perf_counter()
        ask(*arguments)
        return 1e3 * (terminal.wait_for("Exit requested!") - started)

    typed, signals = interleaved(
        round(200 * scale),
        lambda: heard(os.write, fd, b"q\n"),
        lambda: heard(os.kill, pid, signal.SIGTERM),
    )
    os.write(fd, b"s\n")
    terminal.wait_gone()
    for request, milliseconds in (("q + Enter", typed), ("SIGTERM", signals)):
        name = f'{request} to "Exit requested", all cores in a matrix product'
        yield Figure(f"{name}: median", "ms", milliseconds, 5)
        slow = sorted(milliseconds)[int(0.99 * len(milliseconds))]
        yield Figure(f"{name}: 99th percentile", "ms", [slow], 20)


def leaving(scale: float, folder: Path) -> Iterator[Figure]:
    def leave(workers: int) -> float:
        directory = ["--checkpoint-dir", folder / str(workers)]
        terminal = Terminal(ours(*TINY, *ENDLESS, "--workers", workers, *directory))
        terminal.wait_for("step ")
        terminal.wait_for("step ")
        os.write(terminal.process.fd, b"q\n")
        requested, saving = terminal.wait_for("requested!"), terminal.wait_for("Saving emergency")
        saved = terminal.wait_for("saved: ")
        return terminal.wait_gone() - requested - (saved - saving)

    rounds = max(2, round(10 * scale))
    without, with_two = interleaved(rounds, lambda: leave(0), lambda: leave(2))
    name = 'from "Exit requested" to the process gone, less the save'
    yield Figure(name, "s", without, 0.3)
    yield Figure(f"{name}, with 2 workers", "s", with_two, 0.6)


# ---- What does a save cost? -------------------------------------------------------------------


def model_sizes(scale: float) -> dict[str, int]:
    """Of a model whose state has 1.13 GiB for scale 1."""
    return {"context": 64, "layers": 8, "dim": max(16, round(1024 * scale**0.5 / 16) * 16)}


def model_options(scale: float, batch_size: int) -> list[object]:
    sizes = {**model_sizes(scale), "batch-size": batch_size}
    return [word for name, size in sizes.items() for word in (f"--{name}", size)]


def trained_state(scale: float) -> dict:
    """Weights and optimizer state as after a step."""
    model = t.ByteLM(**model_sizes(scale), heads=4, experts=4, dropout=0.0, rotations=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def timed_save(path: Path, write: Callable[[Path], None]) -> float:
    """Seconds of writing a new file; it is deleted, and the disk quiet, before the next."""
    os.sync()
    seconds = seconds_to(write, path)
    path.unlink()
    return seconds


def saves_and_loads(scale: float, folder: str, rounds: int) -> dict:
    state, path = trained_state(scale), Path(folder, "saved.pt")
    tensors: list[torch.Tensor] = []
    t.mapped(state, lambda leaf: tensors.append(leaf) if t.is_tensor(leaf) else None)
    size = sum(tensor.nbytes for tensor in tensors)

    def save(path: Path) -> None:
        t.save_checkpoint(state, path)

    def write(path: Path) -> None:
        with open(path, "wb", buffering=0) as file:
            for tensor in tensors:
                data = memoryview(tensor.numpy().reshape(-1)).cast("B")
                while data:
                    data = data[file.write(data) :]
            os.fsync(file.fileno())

    def torch_save(path: Path) -> None:
        with open(path, "wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())

    def torch_load(path: Path) -> None:
        torch.load(path, weights_only=True)

    # From here on VmHWM is a new peak.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    timed_save(path, save)
    extra = max(0, memory("VmHWM") - before) / size
    writers = [functools.partial(timed_save, path, way) for way in (save, write, torch_save)]
    seconds = interleaved(rounds, *writers)
    save(path)
    readers = [functools.partial(seconds_to, way, path) for way in (t.load_checkpoint, torch_load)]
    seconds += interleaved(rounds, *readers)
    speeds = [[size / GIB / second for second in times] for times in seconds]
    names = ("save", "write", "torch_save", "load", "torch_load")
    return {"size": size, "extra": extra, **dict(zip(names, speeds))}


def saving(scale: float, folder: Path) -> Iterator[Figure]:
    """On the disk, and on a file system in memory if there is one."""
    folder.mkdir()
    for place, where in (("on the disk", folder), ("in memory", Path("/dev/shm"))):
        if not where.is_dir():
            continue
        with tempfile.TemporaryDirectory(dir=where) as target:
            rounds = max(2, round(9 * scale))
            measured = child(saves_and_loads, scale=scale, folder=target, rounds=rounds)
        save = f"save of {measured['size'] / GIB:.2f} GiB, checksummed, {place}"
        load = f"load of it, verified, the file cached, {place}"
        rows = [
            (f"{save} / plain write and fsync by one thread", "save", "write", 1.2),
            (f"{save} / torch.save and fsync", "save", "torch_save", 2.0),
            (f"{load} / torch.load, not verified", "load", "torch_load", 1.2),
        ]
        for name, own, other, limit in rows:
            yield Figure(name, "GiB/s", measured[own], limit, measured[other], at_least=True)
    yield Figure("peak extra memory of that save, of the state", "", [measured["extra"]], 0.05)


def saved_every_step(folder: str, block: int, rounds: int) -> dict:
    """Blocks of steps that save, and blocks of steps that do not, in turn."""
    speeds: dict[str, list[float]] = {"with": [], "without": []}

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
                    speed = block * 16 / (time.perf_counter() - started)
                    speeds["with" if saves else "without"].append(speed)

        run.batches = in_blocks
        t.train(run)

    steps = 2 * (rounds + 1) * (block + 1)
    given = ["--steps", steps, *NO_SAVES, "--keep", 1, "--checkpoint-dir", folder]
    assert t.main(train, argv=words(given), **t.OPTIONS) == 0
    return {name: values[1:] for name, values in speeds.items()}


def every_step(scale: float, folder: Path) -> Iterator[Figure]:
    block, rounds = max(2, round(20 * scale)), max(2, round(12 * scale))
    measured = child(saved_every_step, folder=folder, block=block, rounds=rounds)
    name = "training of the built-in model, saved after every step / without"
    yield Figure(name, "samples/s", measured["with"], 0.95, measured["without"], at_least=True)


def two_ranks(scale: float, folder: Path) -> Iterator[Figure]:
    options, saves = model_options(scale, batch_size=2), max(2, round(7 * scale))
    measured = child(bench_scaling.sharded, 2, folder=folder, options=options, saves=saves)
    size = f"{2 * measured['size'] / GIB:.2f} GiB"
    name = f"save of {size} by two ranks, sharded / by one that has it whole"
    yield Figure(name, "s", measured["save"], 1.0, measured["whole"])


# ---- How soon does it go on? ------------------------------------------------------------------


def resuming(scale: float, folder: Path) -> Iterator[Figure]:
    rounds, peaks = max(2, round(7 * scale)), {"fresh": [], "resumed": []}
    options = [*model_options(scale, batch_size=1), "--checkpoint-dir"]
    trained(*options, folder, "--steps", 1)
    checkpoint = folder / "final.pt"

    def begin(kind: str, *arguments: object) -> float:
        seconds, peak = first_batch(ours(*arguments), batches=3)
        peaks[kind].append(peak)
        return seconds

    fresh, resumed, read = interleaved(
        rounds,
        lambda: begin("fresh", *options, folder / "fresh"),
        lambda: begin("resumed", "--resume", "latest", "--checkpoint-dir", folder),
        # As one would by hand: into memory, and a checksum of it.
        lambda: seconds_to(lambda: zlib.crc32(checkpoint.read_bytes())),
    )
    more = [max(0.0, later - sooner) for sooner, later in zip(fresh, resumed)]
    what = f"{checkpoint.stat().st_size / GIB:.2f} GiB, less that of a fresh start"
    name = f"first batch after resuming {what} / one read and a checksum"
    yield Figure(name, "s", more, 1.5, read)
    name = "peak memory of the resumed run / of the fresh one"
    yield Figure(name, "MiB", peaks["resumed"], 1.1, peaks["fresh"])
    shutil.rmtree(folder)
    trained(*TINY, "--steps", 12, "--checkpoint-dir", folder)
    state, steps = t.load_checkpoint(checkpoint), (max(20, round(10_000 * scale)), 10)
    for step in steps:
        t.save_checkpoint({**state, "step": step}, folder / f"at_{step}.pt")

    def resumed_at(step: int) -> float:
        home = ["--checkpoint-dir", folder / str(step)]
        return first_batch(ours("--resume", folder / f"at_{step}.pt", *home))[0]

    late, early = interleaved(2 * rounds, *(functools.partial(resumed_at, step) for step in steps))
    name = f"first batch after resuming at step {steps[0]:,} / at step {steps[1]}"
    yield Figure(name, "s", late, 1.05, early)


# ---- What does the geometric mode cost, and what is it good for? ------------------------------


def step_time(scale: float, folder: Path) -> Iterator[Figure]:
    for batch_size in (16, 32):
        rounds = max(3, round(40 * scale))
        standard, geometric = child(
            bench_geometric.steps_in_turn, batch_size=batch_size, rounds=rounds
        )
        name = f"a geometric step / a standard one, batch {batch_size}"
        yield Figure(name, "ms", geometric, 1.15, standard)


def convergence(scale: float, folder: Path) -> Iterator[Figure]:
    """Of runs whose schedules end where they end; one row in steps, one in time."""
    best, reached, steps = bench_geometric.steps_saved(scale, folder)
    name = f"the geometric mode's way to the loss of AdamW ({best}) / AdamW's"
    yield Figure(f"{name}, in steps", "steps", reached, 0.5, [steps] * len(reached))
    rounds = max(3, round(40 * scale))
    pairs = child(bench_geometric.steps_in_turn, batch_size=16, rounds=rounds)
    standard, geometric = (statistics.median(times) / 1e3 for times in pairs)
    ours, theirs = [geometric * count for count in reached], [standard * steps] * len(reached)
    yield Figure(f"{name}, in time", "s", ours, 0.575, theirs)


# ---- And other trainers? ----------------------------------------------------------------------


def peers(scale: float, folder: Path, python: str) -> Iterator[Figure]:
    """The same model, data and optimizer in other trainers, each step beside one of a bare loop."""
    script, steps = str(ROOT / "scripts" / "bench_peers.py"), str(max(60, round(200 * scale)))
    measured: dict[str, dict] = {}
    for name in ("train_graceful", "lightning", "transformers", "accelerate"):
        command = [python, script, name, str(folder / name), steps]
        answer = subprocess.run(command, check=False, capture_output=True, text=True)
        if answer.returncode:
            print(f"{name}: left out ({answer.stderr.strip().splitlines()[-1]})", flush=True)
            continue
        one = measured[name] = json.loads(answer.stdout.splitlines()[-1])
        what = f"training with {name} / a bare loop"
        yield Figure(what, "samples/s", one["ours"], 0.0, one["bare"], at_least=True)
    saves = {name: [1e3 * seconds for seconds in one["saves"]] for name, one in measured.items()}
    own = saves.pop("train_graceful")
    for name, others in saves.items():
        what = f"a checkpoint of the built-in model, flushed, by us / by {name}, not flushed"
        yield Figure(what, "ms", own, float("inf"), others)


# ---- All of it --------------------------------------------------------------------------------


QUESTIONS = (
    loop,
    start,
    hearing,
    leaving,
    saving,
    every_step,
    two_ranks,
    resuming,
    step_time,
    convergence,
)
SECTIONS: dict[str, Callable] = {section.__name__: section for section in QUESTIONS}


def machine() -> dict[str, object]:
    names = {platform.processor()}
    with contextlib.suppress(OSError):
        names = set(re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()))
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, check=False, capture_output=True, text=True).stdout
    return {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "commit": commit.strip(),
        "cpu": ", ".join(sorted(names)),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def parse() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    names, lines = list(SECTIONS), "checkpoints/bench.jsonl"
    some = f"of {', '.join(names)}"
    parser.add_argument(
        "--only", nargs="*", choices=names, default=names, metavar="NAME", help=some
    )
    quick = "sizes and rounds so small that the figures say nothing: is the benchmark whole?"
    parser.add_argument("--quick", action="store_true", help=quick)
    packages = "an interpreter that has lightning, transformers and accelerate"
    parser.add_argument("--peers", metavar="PYTHON", help=packages)
    parser.add_argument("--dir", default="checkpoints", help="where to write (default checkpoints)")
    parser.add_argument("--json", default=lines, help=f"a line is appended to it (default {lines})")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    scale = 0.02 if arguments.quick else 1
    sections = {name: SECTIONS[name] for name in arguments.only}
    if arguments.peers:
        sections["peers"] = functools.partial(peers, python=arguments.peers)
    rows: list[dict] = []
    print("| figure | ours | reference | ratio | wanted | met |\n|---|---|---|---|---|---|")
    for name, section in sections.items():
        with tempfile.TemporaryDirectory(prefix="bench_", dir=arguments.dir) as folder:
            for figure in section(scale, Path(folder, name).absolute()):
                print(figure.row(), flush=True)
                verdict = {"value": figure.value, "met": figure.good}
                rows.append({"section": name, **dataclasses.asdict(figure), **verdict})
    with open(arguments.json, "a") as file:
        line = {**machine(), "quick": arguments.quick, "figures": rows}
        file.write(json.dumps(line) + "\n")
    return not arguments.quick and not all(row["met"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
