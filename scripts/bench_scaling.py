#!/usr/bin/env python3
"""Sharded training against world size: measured here, and computed for machines that are not here.

    make bench-scaling        two Markdown tables, in some minutes (2, 4 and 8 processes here)

What is computed follows from what was measured and from assumptions that are printed with it.
"""

import argparse
import functools
import itertools
import json
import operator
import os
import statistics
import sys
import tempfile
import time
import typing
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from bench_tools import child, memory, seconds_to, words
from torch import distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_graceful as t

MIB, GIB = 2**20, 2**30
LAYERS = ["--layers", 16, "--heads", 8, "--experts", 4, "--context", 64, "--batch-size", 8]
MEASURED, SMALL = [*LAYERS, "--dim", 256], [*LAYERS, "--dim", 16]
# Of the model on paper; weights and two moments of each make its state.
PARAMETERS, TENSORS = 7e9, 1500
RANKS_A_MACHINE = 8
# Bytes a second that a machine writes to shared storage, and that rank 0 receives.
MACHINE_BANDWIDTH, NETWORK_BANDWIDTH = 2 * GIB, GIB
# From a process on one machine to one on the next, over TCP.
HOP_SECONDS = 50e-6
PAPER_SIZES = (64, 256, 1024, 4096)


def sharded(folder: str, options: list, saves: int) -> dict:
    """What a rank of a sharded run holds and writes, and how long that takes.

    Beside it, what rank 0 takes to save all of it alone, the ranks to verify a checkpoint as they
    resume, and to tell each other between two batches who has asked for what.
    """
    names = "write_parts", "save", "whole", "verify", "exchange"
    times: dict[str, list[float]] = {name: [] for name in names}
    result: dict[str, typing.Any] = {}
    write_parts = t.write_parts

    def timed_parts(parts: Sequence[t.Part], *where: object) -> list[int]:
        started = time.perf_counter()
        checksums = write_parts(parts, *where)
        times["write_parts"].append(time.perf_counter() - started)
        result["size"] = sum(len(part.data) for part in parts)
        return checksums

    def measure(run: t.Run) -> None:
        shared, alone = Path(folder, "shared.pt"), Path(folder, "alone.pt")
        state = run.processes.rows(run.state_dict("periodic"))
        whole = t.mapped(state, all_rows)
        for _ in range(saves):
            run.processes.first(lambda: shared.unlink(missing_ok=True))
            os.sync()
            dist.barrier()
            t.write_parts = timed_parts
            writers = run.processes.writers()
            laid_out = t.laid_out(state, run.rank)
            times["save"].append(seconds_to(t.write_checkpoint, *laid_out, shared, writers))
            t.write_parts = write_parts
            dist.barrier()
            times["verify"].append(seconds_to(run.processes.read, shared))
            dist.barrier()
            if run.rank == 0:
                alone.unlink(missing_ok=True)
                os.sync()
                times["whole"].append(seconds_to(t.save_checkpoint, whole, alone))
            dist.barrier()
        for _ in range(200):
            dist.barrier()
            times["exchange"].append(seconds_to(run.processes.exchange, {"loss": (1.0, 1)}))

    def train(run: t.Run) -> None:
        batches = run.batches

        def measured(*arguments: object) -> Iterator:
            for number, batch in enumerate(batches(*arguments)):
                yield batch
                if number == 3:
                    # Three saves beside training are part of the peak.
                    result["peak"] = memory("VmHWM")
                    result["parameters"] = sum(p.numel() for p in run.module.parameters())
                    measure(run)

        run.batches = measured
        t.train(run)

    given = ["--steps", 4, "--save-every", 1, "--shard", "--checkpoint-dir", folder, *options]
    assert t.main(train, argv=words(given), **t.OPTIONS) == 0
    return {**times, **result}


def all_rows(leaf: object) -> object:
    """As many bytes as all ranks have together."""
    if isinstance(leaf, t.Rows):
        return torch.zeros(leaf.shape, dtype=leaf.local.dtype)
    return leaf


def exchange(ranks: int, tensors: int) -> tuple[float, float]:
    """What rank 0 gets from a rank for each tensor: seconds of reading and joining it, bytes."""
    numbers = [zlib.crc32(b"%d" % number) for number in range(tensors)]
    answers = [json.dumps([numbers, None]) for _ in range(ranks)]
    started = time.perf_counter()
    for shares in zip(*(json.loads(answer)[0] for answer in answers)):
        functools.reduce(operator.xor, shares)
    seconds = time.perf_counter() - started
    return seconds / (ranks * tensors), len(answers[0]) / tensors


def table(*rows: Sequence[object]) -> None:
    for cells in rows:
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def measured_table(quick: bool, directory: str) -> None:
    modes, sizes, model, saves = ("standard", "geometric"), (2, 4, 8), MEASURED, 3
    if quick:
        modes, sizes, model, saves = ("geometric",), (2,), SMALL, 1
    head = "processes", "mode", "peak memory of each", "of it the program", "size of its part"
    head += "its part written in", "save as a whole", "verified in", "exchange"
    table(head, ["---:", "---", *["---:"] * 7])
    # As train_torchrun.sh does.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "262144")
    rates, state = [], 0.0
    with tempfile.TemporaryDirectory(prefix="bench_", dir=directory) as folder:
        for mode, size in itertools.product(modes, sizes):
            where, options = Path(folder).absolute() / f"{mode}_{size}", ["--mode", mode]
            own = child(sharded, size, folder=where, options=[*model, *options], saves=saves)
            base = own
            if not quick:
                empty, few = where / "small", [*SMALL, *options]
                base = child(sharded, size, folder=empty, options=few, saves=1)
            names = "write_parts", "save", "verify", "exchange"
            writing, save, verify, exchanged = (statistics.median(own[name]) for name in names)
            state = size * own["size"]
            rates.append(state / writing / GIB)
            cells = [f"{own['peak'] / MIB:,.0f} MiB", f"{base['peak'] / MIB:,.0f} MiB"]
            cells += [f"{own['size'] / MIB:,.1f} MiB", f"{writing:.2f} s", f"{save:.2f} s"]
            table([size, mode, *cells, f"{verify:.2f} s", f"{1e3 * exchanged:.2f} ms"])
    parameters = own["parameters"]
    print(
        f"\nThe model has {parameters / 1e6:.1f} million parameters, its weights"
        f" {4 * parameters / MIB:,.0f} MiB, its state {state / MIB:,.0f} MiB (geometric)."
        f" Together the processes wrote {min(rates):.2f} to {max(rates):.2f} GiB/s."
    )


def computed_table(quick: bool) -> None:
    seconds, size = exchange(4, 10) if quick else exchange(256, TENSORS)
    print(
        f"\nOn paper: {PARAMETERS / 1e9:g} billion parameters in {TENSORS:,} tensors, AdamW;"
        f" {RANKS_A_MACHINE} processes a machine, which writes {MACHINE_BANDWIDTH / GIB:g} GiB/s to"
        f" shared storage; a hop between machines {1e6 * HOP_SECONDS:g} us; rank 0 receives"
        f" {NETWORK_BANDWIDTH / GIB:g} GiB/s.\nMeasured: {1e9 * seconds:.0f} ns of rank 0, and"
        f" {size:.0f} bytes, for the checksum of each tensor of each rank.\n"
    )
    head = "processes", "exchange travels", "size of each part", "parts written in"
    table([*head, "checksums", "save as a whole"], ["---:"] * 6)
    for ranks in PAPER_SIZES:
        part = 12 * PARAMETERS / ranks
        writing = part * RANKS_A_MACHINE / MACHINE_BANDWIDTH
        checksums = ranks * TENSORS * (seconds + size / NETWORK_BANDWIDTH)
        cells = [f"{2e3 * (ranks - 1) * HOP_SECONDS:.1f} ms", f"{part / MIB:,.0f} MiB"]
        cells += [f"{one:.1f} s" for one in (writing, checksums, writing + checksums)]
        table([f"{ranks:,}", *cells])
    print(
        "\nAn exchange stands between two batches: where it takes more than a hundredth of a batch,"
        " take larger batches,\nor more memory of fewer processes. A save is beside training:"
        " its checksums are what grows with the processes."
    )


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    quick = "a size so small that the figures say nothing: is the benchmark whole?"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--dir", default="checkpoints", help="where to write (default checkpoints)")
    arguments = parser.parse_args()
    measured_table(arguments.quick, arguments.dir)
    computed_table(arguments.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
