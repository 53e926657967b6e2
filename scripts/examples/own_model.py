"""Your own model: a CNN on images that are augmented at random.

    python scripts/examples/own_model.py                  q + Enter saves and leaves
    python scripts/examples/own_model.py --resume latest  goes on: the same run, bit for bit

Also: make train SCRIPT=scripts/examples/own_model.py, and so every other target and wrapper.
"""

import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Where train_graceful.py lies; a copy of it beside your script needs no such line.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_graceful as tg


class Images(torch.utils.data.Dataset):
    """Made-up images (3, 32, 32) of 10 classes: the pattern of a class under a lot of noise."""

    def __init__(self, train: bool) -> None:
        patterns = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        patterns = F.interpolate(patterns, size=32, mode="bilinear")
        count, generator = (2000, torch.Generator()) if train else (500, torch.Generator())
        generator.manual_seed(1 if train else 2)
        self.labels = torch.randint(10, (count,), generator=generator)
        noise = torch.randn(count, 3, 32, 32, generator=generator)
        self.images = patterns[self.labels] + 5 * noise
        self.train = train

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        if self.train:
            # Python's, numpy's and torch's random numbers: a resumed run draws the same ones.
            if random.random() < 0.5:
                image = image.flip(-1)
            image = image.roll(tuple(np.random.randint(-2, 3, size=2)), dims=(1, 2))
            image = image + 0.1 * torch.randn(3, 1, 1)
        return image, self.labels[index]


def cnn() -> nn.Module:
    def block(inputs: int, outputs: int) -> nn.Module:
        convolution = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))

    head = [nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * 4 * 4, 10)]
    return nn.Sequential(block(3, 8), block(8, 16), block(16, 32), *head)


def train(run: tg.Run) -> None:
    """Trains a small CNN on made-up images."""
    o = run.options
    run.data(Images(train=True), Images(train=False))
    model = run.model(cnn())
    optimizer = torch.optim.AdamW(model.parameters(), o.lr, weight_decay=o.weight_decay)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, o.lr, total_steps=run.total_steps)
    run.keep(optimizer=optimizer, scheduler=scheduler)

    def evaluate(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        # A value for each sample; their means are the result.
        images, labels = batch
        logits = model(images)
        loss = F.cross_entropy(logits, labels, reduction="none")
        return {"loss": loss, "accuracy": logits.argmax(dim=1) == labels}

    for images, labels in run.batches(evaluate, best="max accuracy"):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        run.clip_gradients(1.0)
        optimizer.step()
        scheduler.step()
        run.log(loss=loss)


if __name__ == "__main__":
    tg.main(train, lr=3e-3, weight_decay=0.05, batch_size=64, epochs=8, workers=2, eval_every=31)
