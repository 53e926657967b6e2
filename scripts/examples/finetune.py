"""Fine-tuning: the head first, then the body too, at a smaller rate; early stopping.

    python scripts/examples/finetune.py                  q + Enter saves and leaves
    python scripts/examples/finetune.py --resume latest  goes on: the same run, bit for bit

metrics.csv has a rate for each group: lr_optimizer, lr_optimizer.1.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

# Where train_graceful.py lies; a copy of it beside your script needs no such line.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_graceful as tg


def made_up(count: int, seed: int) -> TensorDataset:
    """Points of 2 classes with some wrong labels, which a long training learns by heart."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, 8, generator=generator)
    labels = points[:, :2].prod(dim=1) > 0
    wrong = torch.rand(count, generator=generator) < 0.1
    return TensorDataset(points, (labels ^ wrong).long())


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # In the place of a network that has been trained on something else.
        self.body = nn.Sequential(nn.Linear(8, 128), nn.BatchNorm1d(128), nn.ReLU())
        self.head = nn.Linear(128, 2)

    def forward(self, points: Tensor) -> Tensor:
        return self.head(self.body(points))


def train(run: tg.Run) -> None:
    """Fine-tunes a network for as long as that helps."""
    o = run.options
    run.data(made_up(512, seed=1), made_up(512, seed=2))
    model = run.model(Classifier())
    body, head = run.module.body, run.module.head
    groups = [
        {"params": head.parameters(), "lr": o.lr},
        {"params": body.parameters(), "lr": o.lr * o.body_rate},
    ]
    optimizer = run.keep(optimizer=torch.optim.AdamW(groups))

    def evaluate(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        points, labels = batch
        return {"loss": F.cross_entropy(model(points), labels, reduction="none")}

    for points, labels in run.batches(evaluate):
        if run.evaluation and run.step - run.best_step >= o.patience:
            break
        # As the step says, so that it needs no thought on resume.
        thawed = run.step >= o.frozen_steps
        body.requires_grad_(thawed)
        # The statistics of a frozen BatchNorm stand still too.
        body.train(thawed)
        loss = F.cross_entropy(model(points), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss)


if __name__ == "__main__":
    tg.main(
        train,
        lr=1e-2,
        body_rate=tg.option(0.3, "the body's rate, as a part of the head's"),
        frozen_steps=tg.option(40, "batches in which the head learns alone"),
        patience=tg.option(80, "batches without a better evaluation before it ends"),
        batch_size=32,
        steps=1000,
        eval_every=20,
    )
