"""SAM: an optimizer around an optimizer.

    python scripts/examples/sam.py                  q + Enter saves and leaves
    python scripts/examples/sam.py --resume latest  goes on: the same run, bit for bit

The outer one is kept, and with it the inner one.
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


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization (Foret et al., 2021).

    AdamW steps by the gradient that is found a bit uphill, where the loss is worst.
    """

    def __init__(self, parameters, lr: float, rho: float) -> None:
        super().__init__(parameters, {"lr": lr, "rho": rho})
        # Of the same groups: a scheduler of this one sets the rate of both.
        self.inner = torch.optim.AdamW(self.param_groups)

    @torch.no_grad()
    def climb(self) -> None:
        """Behind the first backward()."""
        self.before = []
        for group in self.param_groups:
            weights = [one for one in group["params"] if one.grad is not None]
            norm = nn.utils.get_total_norm([one.grad for one in weights])
            for one in weights:
                self.before.append((one, one.clone()))
                one.add_(one.grad * (group["rho"] / (norm + 1e-12)))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Behind the second one."""
        for one, before in self.before:
            one.copy_(before)
        self.inner.step()


def made_up(count: int, seed: int) -> TensorDataset:
    """Points of 4 classes that overlap."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    noise = torch.randn(count, 16, generator=generator)
    return TensorDataset(noise + 2 * F.one_hot(labels, 16), labels)


def train(run: tg.Run) -> None:
    """Trains a small network by SAM."""
    o = run.options
    run.data(made_up(1024, seed=1), made_up(512, seed=2))
    model = run.model(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)))
    optimizer = run.keep(optimizer=SAM(model.parameters(), o.lr, o.rho))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.total_steps)
    scheduler = run.keep(scheduler=cosine)

    def evaluate(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        points, labels = batch
        return {"loss": F.cross_entropy(model(points), labels, reduction="none")}

    for points, labels in run.batches(evaluate):
        loss = F.cross_entropy(model(points), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.climb()
        optimizer.zero_grad()
        F.cross_entropy(model(points), labels).backward()
        optimizer.step()
        scheduler.step()
        run.log(loss=loss)


if __name__ == "__main__":
    rho = tg.option(0.05, "how far uphill")
    tg.main(train, lr=3e-3, rho=rho, batch_size=32, epochs=5, eval_every="epoch")
