"""Programs that people could have written for models of their own; program(train, **options) is one as a script runs it."""

import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import train_graceful as t


def program(train, **options):
    """What a script does at its end, for a child of the tests (see campaign.Child)."""
    defaults = {"batch_size": 8, "steps": 8, "eval_every": 4, "save_every": 3, "log_every": 1}
    return lambda: t.main(train, **{**defaults, "lr": 1e-2, **options})


class Images(torch.utils.data.Dataset):
    """Images of four classes in a noise of their own, augmented at random by every generator there is."""

    def __init__(self, count: int, augmented: bool) -> None:
        generator = torch.Generator().manual_seed(count)
        self.labels = torch.randint(4, (count,), generator=generator)
        noise = torch.randn(count, 3, 8, 8, generator=generator)
        self.images = noise + self.labels.view(-1, 1, 1, 1)
        self.augmented = augmented

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        image = self.images[index]
        if self.augmented:
            image = image.flip(-1) if random.random() < 0.5 else image
            image = image.roll(int(np.random.randint(3)), dims=-1) + 0.1 * torch.randn(())
        return image, self.labels[index]


def cnn(dropout: float = 0.3) -> nn.Module:
    """A plain one, with BatchNorm; 10 rows of weights cannot be shared out equally among four.

    No bias comes before a BatchNorm: its gradient would be rounding errors, and Adam's step as long as any.
    """
    return nn.Sequential(
        nn.Conv2d(3, 10, 3, padding=1, bias=False),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.Conv2d(10, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(8 * 36, 4),
    )


class Residual(nn.Module):
    """Layers in an nn.ModuleList, and no BatchNorm: any number of ranks computes the same."""

    def __init__(self, width: int = 24, layers: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(3 * 64, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.last = nn.Linear(width, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.first(images.flatten(1))
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.last(x)


def classify(make, training: int = 43, validation: int = 13, augmented: bool = True):
    """A train(run) for images with the model that make() returns."""

    def train(run: t.Run) -> None:
        o = run.options
        run.data(Images(training, augmented), Images(validation, False))
        model = run.model(make())
        optimizer = run.keep(optimizer=torch.optim.AdamW(model.parameters(), o.lr))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, o.lr, total_steps=run.total_steps)
        scheduler = run.keep(scheduler=schedule)

        def evaluate(batch):
            images, labels = batch
            logits = model(images)
            loss = F.cross_entropy(logits, labels, reduction="none")
            return {"loss": loss, "accuracy": logits.argmax(1) == labels}

        for images, labels in run.batches(evaluate, best="max accuracy"):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            run.clip_gradients(1.0)
            optimizer.step()
            scheduler.step()
            run.log(loss=loss)

    return train


class Gan(nn.Module):
    """Two networks in one module: each of its two losses leaves parameters without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3 * 64))
        self.discriminator = nn.Sequential(nn.Linear(3 * 64, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, noise: torch.Tensor, images: torch.Tensor | None = None) -> torch.Tensor:
        """The generator's loss, or with images the discriminator's; one for each sample."""
        made = self.generator(noise)
        if images is None:
            return F.softplus(-self.discriminator(made)).squeeze(1)
        seen = self.discriminator(torch.cat([made.detach(), images.flatten(1)]))
        fake, real = seen.squeeze(1).chunk(2)
        return F.softplus(fake) + F.softplus(-real)


def train_gan(run: t.Run) -> None:
    run.data(Images(43, False), Images(13, False))
    model = run.model(Gan())
    adam = torch.optim.Adam
    generator = run.keep(generator=adam(run.module.generator.parameters(), run.options.lr))
    discriminator = run.keep(
        discriminator=adam(run.module.discriminator.parameters(), run.options.lr)
    )

    def noise_for(images: torch.Tensor) -> torch.Tensor:
        """A function of the images: the same on any number of ranks."""
        return images[:, 0, 0, :4]

    def evaluate(batch):
        images, _ = batch
        return {"loss": model(noise_for(images), images)}

    for images, _ in run.batches(evaluate):
        discriminator.zero_grad()
        loss = model(noise_for(images), images).mean()
        loss.backward()
        discriminator.step()
        generator.zero_grad()
        generator_loss = model(noise_for(images)).mean()
        generator_loss.backward()
        generator.step()
        run.log(loss=loss, generator_loss=generator_loss)
