"""One other trainer on the same model, data and optimizer, its every step followed by one of the bare loop.

    bench_peers.py NAME FOLDER STEPS        NAME: train_graceful, lightning, transformers or accelerate

Prints a JSON object: tokens per second of both, in blocks, and seconds of writing one checkpoint. scripts/bench.py --peers
calls it with the interpreter of the environment that `make bench-peers` makes.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import bench  # noqa: E402

import train_graceful as t  # noqa: E402

BLOCK = 20


class Clock:
    """After every step of a trainer, a step of the bare loop; between() is what the trainer calls there."""

    def __init__(self, config: t.Config, data: t.ByteDataset) -> None:
        self.bare = bench.bare_loop(config, data, torch.device("cpu"))
        self.tokens = config.batch_size * config.context
        self.times: list[float] = []
        self.bare_times: list[float] = []
        self.saves: list[float] = []
        self.mark = time.perf_counter()

    def between(self) -> None:
        ended = time.perf_counter()
        next(self.bare)
        self.times.append(ended - self.mark)
        self.mark = time.perf_counter()
        self.bare_times.append(self.mark - ended)

    def save(self, write: Callable[[], object]) -> None:
        for _ in range(5):
            os.sync()
            started = time.perf_counter()
            write()
            self.saves.append(time.perf_counter() - started)

    def result(self) -> dict[str, list[float]]:
        return {"ours": bench.rates(self.times, BLOCK, self.tokens), "bare": bench.rates(self.bare_times, BLOCK, self.tokens),
                "saves": self.saves}


class Windows(torch.utils.data.Dataset):
    """One window an item, as the other trainers want it."""

    def __init__(self, data: t.ByteDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.train_windows

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.data.read(index * self.data.context, self.data.context + 1)


def parts(config: t.Config):
    """Model, optimizer and scheduler, as the program makes them."""
    torch.manual_seed(config.seed)
    model = t.ByteLM(config)
    controller = t.StandardTrainingController(model, config, config.steps)
    return model, controller.optimizers["adamw"], controller.schedulers["adamw"]


def train_graceful(config, data, clock, folder: Path, steps: int) -> None:
    screen = t.Screen()
    with t.ExitMonitor(screen, keyboard=False) as monitor:
        run = bench.started_run(["--checkpoint-dir", folder, *bench.ENDLESS], monitor, screen)
        alternating = bench.Alternating(run.data, lambda: next(clock.bare), steps)
        with contextlib.suppress(bench.Enough):
            t.controller_training_loop(run, run.controller, alternating, monitor)
        clock.times, clock.bare_times = alternating.times, alternating.other_times
        clock.save(lambda: t.save_checkpoint(run.state_dict("periodic"), folder / "saved.pt"))


def lightning(config, data, clock, folder: Path, steps: int) -> None:
    import lightning

    model, optimizer, scheduler = parts(config)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch, number):
            loss, _ = t.task_loss(self.model, batch)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    class Between(lightning.Callback):
        def on_train_batch_end(self, *arguments) -> None:
            clock.between()

    trainer = lightning.Trainer(accelerator="cpu", max_steps=steps, gradient_clip_val=config.grad_clip, log_every_n_steps=config.log_every,
                                default_root_dir=folder, enable_checkpointing=False, callbacks=[Between()], enable_model_summary=False)
    trainer.fit(Module(), torch.utils.data.DataLoader(Windows(data), config.batch_size, shuffle=True))
    clock.save(lambda: trainer.save_checkpoint(folder / "saved.ckpt"))


def transformers(config, data, clock, folder: Path, steps: int) -> None:
    import transformers

    model, optimizer, scheduler = parts(config)

    class WithLoss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, windows):
            return {"loss": t.task_loss(self.model, windows)[0]}

    class Between(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **rest):
            clock.between()
            if state.global_step > steps - 5:
                control.should_save = True
                os.sync()
                clock.mark = time.perf_counter()

        def on_save(self, args, state, control, **rest):
            clock.saves.append(time.perf_counter() - clock.mark)

    arguments = transformers.TrainingArguments(str(folder), max_steps=steps, per_device_train_batch_size=config.batch_size, use_cpu=True,
                                               max_grad_norm=config.grad_clip, logging_steps=config.log_every, save_strategy="no", report_to=[],
                                               remove_unused_columns=False)
    transformers.Trainer(WithLoss(), arguments, train_dataset=Windows(data), data_collator=lambda items: {"windows": torch.stack(items)},
                         optimizers=(optimizer, scheduler), callbacks=[Between()]).train()
    del clock.times[-5:], clock.bare_times[-5:]


def accelerate(config, data, clock, folder: Path, steps: int) -> None:
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader(Windows(data), config.batch_size, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(*parts(config)[:2], loader, parts(config)[2])
    for step, batch in enumerate(loader):
        optimizer.zero_grad()
        loss, _ = t.task_loss(model, batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        scheduler.step()
        if step % config.log_every == 0:
            print(f"step {step} loss {loss.item():.4f}", file=sys.stderr)
        clock.between()
        if step + 1 == steps:
            break
    clock.save(lambda: accelerator.save_state(str(folder / "saved")))


def main() -> None:
    name, folder, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    config = t.Config.from_options({})
    clock = Clock(config, data := t.ByteDataset(config))
    with contextlib.redirect_stdout(sys.stderr):
        globals()[name](config, data, clock, folder, steps)
    print(json.dumps(clock.result()))


if __name__ == "__main__":
    main()
