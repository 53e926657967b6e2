#!/usr/bin/env python3
"""Sharded training against world size: measured on this machine's processes, and computed for machines that are not here.

    make bench-scaling        two Markdown tables, in some minutes

What is computed follows from what was measured and from the assumptions below, which are printed with it.
"""

import argparse
import functools
import json
import operator
import os
import statistics
import sys
import tempfile
import time
import zlib
from pathlib import Path

from bench import GIB, MIB, ROOT, child

sys.path.insert(0, str(ROOT))

MEASURED = "--dim 512 --layers 16 --heads 8 --experts 4 --context 64 --batch-size 8".split()
SMALL = "--dim 16 --layers 16 --heads 8 --experts 4 --context 64 --batch-size 8".split()
PARAMETERS, TENSORS = 7e9, 1500  # of the model on paper; weights and two moments of each make its state
RANKS_A_MACHINE = 8
MACHINE_BANDWIDTH = 2 * GIB  # bytes a second that a machine writes to shared storage
HOP_SECONDS = 50e-6  # from a process on one machine to one on the next, over TCP
NETWORK_BANDWIDTH = GIB  # bytes a second that rank 0 receives
PAPER_SIZES = (64, 256, 1024, 4096)


def exchange(ranks: int, tensors: int) -> tuple[float, float]:
    """Seconds that rank 0 needs for the number that a rank says of a tensor (read, and joined with the others'), and its bytes."""
    numbers = [zlib.crc32(b"%d" % number) for number in range(tensors)]
    answers = [json.dumps([numbers, None]) for _ in range(ranks)]
    started = time.perf_counter()
    for shares in zip(*(json.loads(answer)[0] for answer in answers)):
        functools.reduce(operator.xor, shares)
    return (time.perf_counter() - started) / (ranks * tensors), len(answers[0]) / tensors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a size so small that the figures say nothing: is the benchmark whole?")
    parser.add_argument("--dir", default="checkpoints", help="where to write, since disks differ (default checkpoints)")
    arguments = parser.parse_args()
    modes, sizes, model, saves = (("geometric",), (2,), SMALL, 1) if arguments.quick else (("standard", "geometric"), (1, 2, 4), MEASURED, 5)
    print("| processes | mode | peak memory of each | of it the program | size of its part | its part written in | save as a whole | agreement |\n"
          "|---:|---|---:|---:|---:|---:|---:|---:|", flush=True)
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "262144")  # as train_torchrun.sh does
    rates = []
    with tempfile.TemporaryDirectory(prefix="bench_", dir=arguments.dir) as folder:
        for mode in modes:
            for size in sizes:
                where = Path(folder).absolute() / f"{mode}_{size}"
                figures = child("sharded", size, folder=where / "model", options=[*model, "--mode", mode], saves=saves)
                base = figures if arguments.quick else child("sharded", size, folder=where / "small", options=[*SMALL, "--mode", mode], saves=1)
                own, save, agreement = (statistics.median(figures[key]) for key in ("write_parts", "save", "agreement"))
                rates.append(size * figures["size"] / own)
                print(f"| {size} | {mode} | {figures['peak'] / MIB:,.0f} MiB | {base['peak'] / MIB:,.0f} MiB | {figures['size'] / MIB:,.1f} MiB | {own:.2f} s | "
                      f"{save:.2f} s | {1e3 * agreement:.3f} ms |", flush=True)
        parameters, state = figures["parameters"], size * figures["size"]
    print(f"\nThe model has {parameters / 1e6:.1f} million parameters, its weights {4 * parameters / MIB:,.0f} MiB, its state "
          f"{state / MIB:,.0f} MiB (geometric). Together the processes wrote {min(rates) / GIB:.2f} to {max(rates) / GIB:.2f} GiB/s.")

    seconds, said = exchange(4, 10) if arguments.quick else exchange(256, TENSORS)
    print(f"\nOn paper: {PARAMETERS / 1e9:g} billion parameters in {TENSORS:,} tensors, AdamW; {RANKS_A_MACHINE} processes a machine, which writes "
          f"{MACHINE_BANDWIDTH / GIB:g} GiB/s to shared storage; a hop between machines {1e6 * HOP_SECONDS:g} us; rank 0 receives {NETWORK_BANDWIDTH / GIB:g} GiB/s.\n"
          f"Measured: {1e9 * seconds:.0f} ns of rank 0, and {said:.0f} bytes, for the checksum of each tensor of each rank.\n")
    print("| processes | agreement travels | size of each part | parts written in | checksums | save as a whole |\n"
          "|---:|---:|---:|---:|---:|---:|")

    for size in PAPER_SIZES:
        part = 12 * PARAMETERS / size
        writing = part * RANKS_A_MACHINE / MACHINE_BANDWIDTH
        table = size * TENSORS * (seconds + said / NETWORK_BANDWIDTH)
        print(f"| {size:,} | {2e3 * (size - 1) * HOP_SECONDS:.1f} ms | {part / MIB:,.0f} MiB | {writing:.1f} s | "
              f"{table:.1f} s | {writing + table:.1f} s |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
