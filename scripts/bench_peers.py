"""A trainer beside a loop by hand, of the same model: blocks of steps of both, in turn.

Each function from train_graceful on runs in a process of its own, other trainers in the environment
that `make bench-peers` makes; it returns the milliseconds of their steps.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from bench_tools import NEVER, NO_SAVES, words
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "examples")]
import own_model as example

import train_graceful as t

BATCH_SIZE = 16


def by_hand(model, loss_of: Callable, loader: Iterable, optimizer, scheduler) -> Iterator[None]:
    """A loop such as one writes; a step for every next()."""
    step = 0
    while True:
        for batch in loader:
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            if step % 10 == 0:
                print(f"step {step} loss {loss.item():.4f}", flush=True)
            step += 1
            yield


class Clock:
    """Seconds of blocks of steps: `ours` of a trainer, `bare` of a loop by hand, in turn.

    The trainer calls step() after each of its steps. So all that it does between two steps is
    measured. Of a loop with workers a few batches lie ready when its turn comes, of both as many.
    """

    def __init__(self, bare: Iterator[None], block: int) -> None:
        self.bare, self.block = bare, block
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self._steps, self._started = 0, time.perf_counter()

    def step(self) -> None:
        self._steps += 1
        if self._steps % self.block:
            return
        ended = time.perf_counter()
        for _ in range(self.block):
            next(self.bare)
        self.ours.append(ended - self._started)
        self._started = time.perf_counter()
        self.theirs.append(self._started - ended)

    def after_batches(self, run: t.Run) -> None:
        """From now on the batches of a run are counted here."""
        batches = run.batches
        # The bare loop's optimizer may step, for an object that has it is kept.
        run.keep(clock=self)

        def counted(*arguments: object, **keywords: object) -> Iterator:
            for batch in batches(*arguments, **keywords):
                yield batch
                self.step()

        run.batches = counted

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass

    def milliseconds(self) -> dict[str, list[float]]:
        """Of a step, in each block but the first, which is a warm-up."""
        both = {"ours": self.ours, "bare": self.theirs}
        return {name: [1e3 * one / self.block for one in times[1:]] for name, times in both.items()}


class WithLoss(nn.Module):
    """The built-in model, whose forward pass returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = t.ByteLM(128, 4, 4, 128, 4, 0.0, False)

    def forward(self, windows: Tensor) -> dict[str, Tensor]:
        windows = windows.long()
        logits = self.model(windows[:, :-1])
        return {"loss": F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())}

    def optimizer_and_scheduler(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1, fused=True)
        return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=50)


def text_loader() -> DataLoader:
    data, _ = t.text_datasets((), 128, Path("/nowhere"))
    return DataLoader(data, BATCH_SIZE, shuffle=True, drop_last=True)


def text_clock() -> Clock:
    model = WithLoss()
    given = text_loader(), *model.optimizer_and_scheduler()
    bare = by_hand(model, lambda windows: model(windows)["loss"], *given)
    return Clock(bare, block=20)


def trained(clock: Clock, blocks: int, train: Callable, given: list, **options: object) -> dict:
    def counted(run: t.Run) -> None:
        clock.after_batches(run)
        train(run)

    argv = ["--steps", blocks * clock.block, *NO_SAVES, "--no-keyboard", *given]
    assert t.main(counted, words(argv), **options).completed
    return clock.milliseconds()


def train_graceful(folder: str, blocks: int) -> dict:
    """the built-in model"""
    return trained(text_clock(), blocks, t.train, ["--checkpoint-dir", folder], **t.OPTIONS)


def geometric(folder: str, blocks: int) -> dict:
    """the built-in model in geometric mode"""
    given = ["--mode", "geometric", "--checkpoint-dir", folder]
    return trained(text_clock(), blocks, t.train, given, **t.OPTIONS)


def own_model(folder: str, blocks: int, keeps: bool = False) -> dict:
    """scripts/examples/own_model.py with 2 workers"""
    settings = {"shuffle": True, "drop_last": True, "num_workers": 2, "persistent_workers": keeps}
    loader = DataLoader(example.Images(train=True), 64, **settings)
    model = example.cnn()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=NEVER)

    def loss_of(batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    # Two epochs.
    clock = Clock(by_hand(model, loss_of, loader, optimizer, scheduler), block=62)
    given = ["--workers", 2, "--checkpoint-dir", folder]
    options = {"lr": 3e-3, "weight_decay": 0.05, "batch_size": 64}
    return trained(clock, blocks, example.train, given, **options)


def own_model_kept(folder: str, blocks: int) -> dict:
    """the same, and the bare loop has persistent_workers=True"""
    return own_model(folder, blocks, keeps=True)


def lightning(folder: str, blocks: int) -> dict:
    """the built-in model, trained by lightning"""
    import lightning

    clock = text_clock()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = WithLoss()

        def training_step(self, batch, number):
            loss = self.model(batch)["loss"]
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            optimizer, scheduler = self.model.optimizer_and_scheduler()
            each_step = {"scheduler": scheduler, "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": each_step}

    class AfterStep(lightning.Callback):
        def on_train_batch_end(self, *arguments) -> None:
            clock.step()

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=blocks * clock.block,
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[AfterStep()],
    )
    trainer.fit(Module(), text_loader())
    return clock.milliseconds()


def transformers(folder: str, blocks: int) -> dict:
    """the built-in model, trained by transformers"""
    import transformers

    clock = text_clock()

    class AfterStep(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **rest):
            clock.step()

    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=blocks * clock.block,
        per_device_train_batch_size=BATCH_SIZE,
        use_cpu=True,
        max_grad_norm=1.0,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
    )
    model = WithLoss()
    transformers.Trainer(
        model,
        arguments,
        train_dataset=text_loader().dataset,
        data_collator=lambda items: {"windows": torch.stack(items)},
        optimizers=model.optimizer_and_scheduler(),
        callbacks=[AfterStep()],
    ).train()
    return clock.milliseconds()
