"""TensorBoard: each row of metrics.csv is a point of each curve, once, however the run is stopped.

    python scripts/examples/log_tensorboard.py                  q + Enter saves and leaves
    python scripts/examples/log_tensorboard.py --resume latest  goes on: the same run, bit for bit
    tensorboard --logdir checkpoints

Needs tensorboard.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torch.utils.tensorboard import SummaryWriter

# Where train_graceful.py lies; a copy of it beside your script needs no such line.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_graceful as tg


def follow(run: tg.Run) -> None:
    folder = Path(run.options.checkpoint_dir, f"tensorboard_{run.run_id}")
    # A killed run goes on from its last checkpoint: the points behind that come again.
    writer = SummaryWriter(folder, purge_step=run.step + 1)

    def report(row: dict[str, float]) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, row["step"])
        # The points are in the file before the checkpoint of their step is.
        writer.flush()

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
