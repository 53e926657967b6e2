"""One trainer on the built-in model and data, its every step followed by one of a bare loop.

    bench_peers.py NAME FOLDER STEPS    NAME: train_graceful, lightning, transformers or accelerate

Prints a JSON object: samples a second of both, and the seconds of writing one checkpoint, five
times. scripts/bench.py --peers calls it in the environment that `make bench-peers` makes.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_bare import Clock, text_loop
from bench_tools import seconds_to, words
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_graceful as t

BATCH_SIZE, SAVES = 16, 5


def flushed_before(save: Callable, *arguments: object) -> float:
    os.sync()
    return seconds_to(save, *arguments)


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

    def optimizer_and_scheduler(self, steps: int):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1, fused=True)
        return optimizer, t.warmup_decay(optimizer, 50, steps, t.cosine)


def train_graceful(clock: Clock, data: t.ByteDataset, folder: Path, steps: int) -> list[float]:
    saves: list[float] = []

    def train(run: t.Run) -> None:
        clock.after_batches(run)
        t.train(run)
        state, path = run.state_dict("periodic"), folder / "saved.pt"
        saves.extend(flushed_before(t.save_checkpoint, state, path) for _ in range(SAVES))

    given = ["--steps", steps, "--eval-every", 10**9, "--no-keyboard", "--checkpoint-dir", folder]
    assert t.main(train, argv=words(given), **t.OPTIONS) == 0
    return saves


def lightning(clock: Clock, data: t.ByteDataset, folder: Path, steps: int) -> list[float]:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = WithLoss()

        def training_step(self, batch, number):
            loss = self.model(batch)["loss"]
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            optimizer, scheduler = self.model.optimizer_and_scheduler(steps)
            each_step = {"scheduler": scheduler, "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": each_step}

    class AfterStep(lightning.Callback):
        def on_train_batch_end(self, *arguments) -> None:
            clock.step()

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[AfterStep()],
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(data, BATCH_SIZE, shuffle=True))
    path = folder / "saved.ckpt"
    return [flushed_before(trainer.save_checkpoint, path) for _ in range(SAVES)]


def transformers(clock: Clock, data: t.ByteDataset, folder: Path, steps: int) -> list[float]:
    import transformers

    saves: list[float] = []

    class AfterStep(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **rest):
            if state.global_step < steps - SAVES:
                clock.step()
                return
            # The last steps are saved.
            control.should_save = True
            os.sync()
            self.started = time.perf_counter()

        def on_save(self, args, state, control, **rest):
            if len(saves) < SAVES:
                saves.append(time.perf_counter() - self.started)

    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
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
        train_dataset=data,
        data_collator=lambda items: {"windows": torch.stack(items)},
        optimizers=model.optimizer_and_scheduler(steps),
        callbacks=[AfterStep()],
    ).train()
    return saves


def accelerate(clock: Clock, data: t.ByteDataset, folder: Path, steps: int) -> list[float]:
    import accelerate

    accelerator, bare = accelerate.Accelerator(cpu=True), WithLoss()
    optimizer, scheduler = bare.optimizer_and_scheduler(steps)
    loader = torch.utils.data.DataLoader(data, BATCH_SIZE, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(bare, optimizer, loader, scheduler)
    for step, batch in enumerate(loader, start=1):
        optimizer.zero_grad()
        loss = model(batch)["loss"]
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 10 == 0:
            print(f"step {step} loss {loss.item():.4f}", file=sys.stderr)
        clock.step()
        if step == steps:
            break
    path = str(folder / "saved")
    return [flushed_before(accelerator.save_state, path) for _ in range(SAVES)]


def main() -> None:
    name, folder, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    data, _ = t.text_datasets((), 128, folder)
    with contextlib.redirect_stdout(sys.stderr):
        clock = Clock(text_loop(t.ByteLM))
        saves = globals()[name](clock, data, folder, steps)
    print(json.dumps({**clock.rates(BATCH_SIZE), "saves": saves}))


if __name__ == "__main__":
    main()
