"""Weights & Biases: each row of metrics.csv is there once, however the run is stopped.

    python scripts/examples/log_wandb.py                  q + Enter saves and leaves
    python scripts/examples/log_wandb.py --resume latest  goes on: the same run, bit for bit

Needs wandb. With WANDB_MODE=offline, upload the run by wandb sync when it has ended.
"""

import csv
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import wandb
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

# Where train_graceful.py lies; a copy of it beside your script needs no such line.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_graceful as tg


def rows_so_far(run: tg.Run) -> Iterator[dict[str, float]]:
    for path in Path(run.options.checkpoint_dir).glob("metrics*.csv"):
        for row in csv.DictReader(path.read_text().splitlines()):
            # A killed run goes on from its last checkpoint: the rows behind that come again.
            if row.pop("run") == run.run_id and int(row["step"]) <= run.step:
                yield {name: float(value) for name, value in row.items() if value}


def follow(run: tg.Run) -> None:
    folder = Path(run.options.checkpoint_dir, f"wandb_{run.run_id}")
    # A process that is killed takes the last seconds of its offline file with it, and no other one
    # can add to that file: it is written anew, from metrics.csv.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    place = {"project": "train_graceful", "id": run.run_id, "resume": "allow", "dir": folder}
    tracker = wandb.init(**place, config=vars(run.options))

    def report(row: dict[str, float]) -> None:
        # Online W&B has those of earlier sessions.
        if row["step"] >= tracker.step:
            tracker.log(row, step=int(row["step"]), commit=True)

    for row in rows_so_far(run):
        report(row)
    run.on_row = report


def made_up(count: int, seed: int) -> TensorDataset:
    points = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(points, points.square().sum(dim=1, keepdim=True))


def train(run: tg.Run) -> None:
    """Learns how far points are from the origin."""
    o = run.options
    run.data(made_up(1024, seed=1), made_up(256, seed=2))
    model = run.model(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1)))
    optimizer = run.keep(optimizer=torch.optim.AdamW(model.parameters(), o.lr))
    if run.rank == 0:
        follow(run)

    def evaluate(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        points, squares = batch
        return {"loss": F.mse_loss(model(points), squares, reduction="none").squeeze(1)}

    for points, squares in run.batches(evaluate):
        loss = F.mse_loss(model(points), squares)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss)


if __name__ == "__main__":
    tg.main(train, lr=1e-2, batch_size=32, epochs=10, eval_every="epoch")
