#!/usr/bin/env python3
"""Prints what each part of the geometric mode does: validation losses, for `make ablation`."""

import argparse
import csv
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from bench_tools import NEVER, NO_SAVES, TINY, child, words

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_graceful as t

GEOMETRIC = ["--mode", "geometric"]
# Adam moves an angle by about its learning rate a step.
FROZEN = [*GEOMETRIC, "--rotation-lr", 1e-12]
TO_ZERO = {"StandardTrainingController": "ToZero"}
LOSSES = ("orthogonality_loss", "rotation_efficiency_loss", "specialization_loss")


class ToZero(t.StandardTrainingController):
    def decay(self, progress: float) -> float:
        """Half a cosine, from 1 down to 0."""
        return 0.5 * (1 + math.cos(math.pi * progress))


class Unrotated(t.GeometricTrainingController):
    """With angles of zero, R is the identity."""

    def __init__(self, run: t.Run, model: torch.nn.Module, loss: Callable) -> None:
        super().__init__(run, model, loss)
        with torch.no_grad():
            for experts in self.experts:
                experts.theta.zero_()


class OneMatrix(t.Experts):
    """All experts have the same first matrix: only rotations tell apart what they see."""

    def __init__(self, dim: int, experts: int, rotations: bool = True) -> None:
        super().__init__(dim, experts, rotations)
        self.w_in = torch.nn.ParameterList([self.w_in[0]] * experts)


def trained(options: list, folder: str, left_out: tuple = (), **replaced: str) -> float:
    """The last validation loss of a run with some parts of the program left out or replaced."""
    for name in left_out:
        setattr(t, name, lambda angles, *_: angles.new_zeros(()))
    for name, other in replaced.items():
        setattr(t, name, globals()[other])
    given = [*options, *NO_SAVES, "--no-keyboard", "--checkpoint-dir", folder]
    assert t.main(t.train, argv=words(given), **t.OPTIONS).completed
    with open(Path(folder, "metrics.csv")) as file:
        return [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]][-1]


def all_trained(runs: dict[str, dict], folder: Path) -> dict[str, float]:
    """As many at a time as there are cores, with one thread each: no time is measured here."""
    os.environ["OMP_NUM_THREADS"] = "1"

    def one(name: str) -> float:
        return child(trained, folder=folder / name, **runs[name])

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return dict(zip(runs, threads.map(one, runs)))


def budget(scale: float, steps: int) -> list[object]:
    steps = round(steps * scale)
    return ["--steps", steps, *([*TINY, "--warmup-steps", 2] if scale < 1 else [])]


# ---- How many steps does it save? -------------------------------------------------------------


def crossing(curve: dict[int, float], target: float) -> float:
    """The smallest budget that reaches the loss, between two that were tried, or NEVER."""
    budgets = sorted(curve)
    for fewer, more in zip(budgets, budgets[1:]):
        if curve[fewer] > target >= curve[more]:
            share = (curve[fewer] - target) / (curve[fewer] - curve[more])
            return fewer * (more / fewer) ** share
    return float(budgets[0]) if curve[budgets[0]] <= target else float(NEVER)


def steps_saved(scale: float, folder: Path) -> tuple[str, list[float], float]:
    """AdamW at its best; for each seed the budget that reaches its loss; AdamW's own budget."""
    seeds, rates, fractions = range(3), (2e-3, 3e-3), (0.35, 0.45, 0.55)
    if scale < 1:
        seeds, rates = range(2), rates[:1]
    adamw = budget(scale, 2000)
    decays: dict[str, dict] = {"a tenth": {}, "zero": TO_ZERO}
    tried = {
        f"lr {rate:g} to {decay}": {"options": [*adamw, "--lr", rate], **replaced}
        for rate in rates
        for decay, replaced in decays.items()
    }
    finals = all_trained(tried, folder)
    best = min(finals, key=lambda name: finals[name])
    runs = {
        f"adamw {seed}": {**tried[best], "options": [*tried[best]["options"], "--seed", seed]}
        # The sweep has had seed 0.
        for seed in seeds[1:]
    }
    budgets = [round(2000 * part) for part in fractions]
    for seed in seeds:
        for steps in budgets:
            options = [*budget(scale, steps), *GEOMETRIC, "--seed", seed]
            runs[f"geometric {seed} {steps}"] = {"options": options}
    losses = {"adamw 0": finals[best], **all_trained(runs, folder)}
    reached = []
    for seed in seeds:
        curve = {round(steps * scale): losses[f"geometric {seed} {steps}"] for steps in budgets}
        reached.append(crossing(curve, losses[f"adamw {seed}"]))
    others = ", ".join(f"{name}: {loss:.3f}" for name, loss in finals.items())
    return f"{best}, best of {others}", reached, 2000 * scale


# ---- Which of its parts help? -----------------------------------------------------------------

WITHOUT_ROTATIONS: dict = {
    "options": FROZEN,
    "left_out": LOSSES,
    "GeometricTrainingController": "Unrotated",
}
VARIANTS: dict[str, dict] = {
    "AdamW (standard mode)": {"options": []},
    "AdamW, decayed to zero": {"options": [], **TO_ZERO},
    "Muon without rotations": WITHOUT_ROTATIONS,
    "rotations frozen at their start": {"options": FROZEN},
    "rotations learned: geometric mode": {"options": GEOMETRIC},
    **{
        f"geometric mode without {one.replace('_', ' ')}": {"options": GEOMETRIC, "left_out": [one]}
        for one in LOSSES
    },
    "one matrix for all experts, without rotations": {**WITHOUT_ROTATIONS, "Experts": "OneMatrix"},
    "one matrix, rotations frozen": {"options": FROZEN, "Experts": "OneMatrix"},
    "one matrix, rotations learned": {"options": GEOMETRIC, "Experts": "OneMatrix"},
}


def ablation(scale: float, steps: int, folder: Path) -> None:
    """Prints the table; a gain counts if it is larger than the spread of the seeds."""
    seeds = range(3) if scale == 1 else range(1)
    runs = {
        f"{name}, seed {seed}": {
            **variant,
            "options": [*variant["options"], *budget(scale, steps), "--seed", seed],
        }
        for seed in seeds
        for name, variant in VARIANTS.items()
    }
    losses = all_trained(runs, folder)
    columns = " | ".join(f"seed {seed}" for seed in seeds)
    print(f"| {round(steps * scale):,} steps | {columns} | mean |")
    print(f"|---|{'---|' * (len(seeds) + 1)}")
    for name in VARIANTS:
        values = [losses[f"{name}, seed {seed}"] for seed in seeds]
        cells = [f"{value:.4f}" for value in [*values, statistics.mean(values)]]
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="of each run (default 400)")
    parser.add_argument("--quick", action="store_true", help="so small that it says nothing")
    parser.add_argument("--dir", default="checkpoints", help="where to write (default checkpoints)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ablation_", dir=arguments.dir) as folder:
        ablation(0.02 if arguments.quick else 1, arguments.steps, Path(folder).absolute())
    return 0


if __name__ == "__main__":
    sys.exit(main())
