"""A sweep of forty small trainings in one process; those that do badly are pruned half-way.

    python scripts/examples/sweep.py      q + Enter leaves the trial and the sweep; again goes on

In a notebook: from sweep import sweep; sweep()
"""

import random
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

# Where train_graceful.py lies; a copy of it beside your script needs no such line.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_graceful as tg


class Pruned(Exception):
    """The trial is not worth the rest of its time; optuna.TrialPruned is another such exception."""


def made_up(count: int, seed: int) -> TensorDataset:
    points = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(points, points.prod(dim=1, keepdim=True))


def train(run: tg.Run) -> None:
    """Learns to multiply."""
    o = run.options
    run.data(made_up(512, seed=1), made_up(256, seed=2))
    model = run.model(nn.Sequential(nn.Linear(2, o.width), nn.ReLU(), nn.Linear(o.width, 1)))
    optimizer = run.keep(optimizer=torch.optim.AdamW(model.parameters(), o.lr))

    def evaluate(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        points, values = batch
        return {"loss": F.mse_loss(model(points), values, reduction="none").squeeze(1)}

    for points, values in run.batches(evaluate):
        half_way = run.step == run.total_steps // 2
        if half_way and run.evaluation and run.evaluation["loss"] > o.worst:
            raise Pruned
        loss = F.mse_loss(model(points), values)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss)


def sweep(trials: int = 40, folder: str = "sweep") -> int:
    """Tries rates and widths at random. Returns the exit code of what has ended it."""
    ended: list[tuple[float, str]] = []
    worst = tg.option(1e9, "loss above which it is pruned half-way", fixed=False)
    options = {"lr": 1e-3, "width": 16, "worst": worst, "batch_size": 32, "epochs": 4}
    for number in range(trials):
        chance = random.Random(number)
        lr, width = 10 ** chance.uniform(-3, -1), chance.choice([4, 16, 64])
        argv = ["--lr", lr, "--width", width, "--checkpoint-dir", f"{folder}/{number}"]
        # A trial that has ended says so at once, one that was left goes on.
        argv += ["--resume", "auto", "--worst", 4 * min(ended, default=(0.5,))[0]]
        try:
            run = tg.main(train, [str(word) for word in argv], eval_every="epoch", **options)
        except Pruned:
            print(f"✂️ Trial {number} is pruned")
            continue
        if not run.completed:
            # q or a signal: it is meant for all of them.
            return run.exit_code
        if run.best is None:
            # No evaluation has found a number.
            continue
        ended.append((run.best, f"trial {number}, lr {lr:.1e}, width {width}"))
    print(f"🏁 {len(ended)} of {trials} trials to the end. The best:", *min(ended, default=()))
    return 0


if __name__ == "__main__":
    sys.exit(sweep())
