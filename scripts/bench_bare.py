"""Loops that one writes by hand, and what it takes to measure another one beside them.

Nothing here is of train_graceful: the models are what the caller hands in.
"""

import inspect
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.nn import functional as F


def text_loop(ByteLM, device="cpu"):
    """For the built-in model and data; a step for every next()."""
    torch.manual_seed(0)
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    others = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    text = b"".join(file.read_bytes() for file in files if not others & set(file.parts))
    windows = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    windows = windows[: len(windows) // 129 * 129].view(-1, 129)
    gpu = device != "cpu"
    loader = torch.utils.data.DataLoader(windows, 16, shuffle=True, drop_last=True, pin_memory=gpu)
    model, step = ByteLM(128, 4, 4, 128, 4, 0.0, False).to(device), 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, fused=True)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=50)
    while True:
        for batch in loader:
            batch = batch.to(device, non_blocking=True).long()
            with torch.autocast(device, torch.bfloat16, enabled=gpu):
                logits = model(batch[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            if step % 10 == 0:
                print(f"step {step} loss {loss.item():.4f}", flush=True)
            step += 1
            yield


def cnn_loop(Images, cnn, workers):
    """What scripts/examples/own_model.py does; a step for every next()."""
    torch.manual_seed(0)
    data, keep = Images(train=True), workers > 0
    loader = torch.utils.data.DataLoader(
        data, 64, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=keep
    )
    model, step = cnn(), 0
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=10**9)
    while True:
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            if step % 10 == 0:
                print(f"step {step} loss {loss.item():.4f}", flush=True)
            step += 1
            yield


def command(sources: Sequence[object], loop: Callable, arguments: str) -> list[str]:
    """Runs a loop of this file, with copies of the classes and functions that it needs."""
    imports = (
        "import random, sysconfig\nfrom pathlib import Path\nimport numpy as np\n"
        "import torch\nfrom torch import Tensor, nn\nfrom torch.nn import functional as F\n"
    )
    texts = [inspect.getsource(source) for source in (*sources, loop)]
    last = f"for _ in {loop.__name__}({arguments}):\n    pass\n"
    return [sys.executable, "-c", "\n".join([imports, *texts, last])]


class Clock:
    """Seconds of blocks of steps: `ours` of a trainer, `bare` of a loop by hand, in turn.

    The trainer calls step() after each of its steps. So all that it does between two steps is
    measured. Of a loop with workers a few batches lie ready when its turn comes, of both as many.
    """

    def __init__(self, bare: Iterator[None], every: int = 1) -> None:
        self.bare, self.every = bare, every
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self._steps, self._started = 0, time.perf_counter()

    def step(self) -> None:
        self._steps += 1
        if self._steps % self.every:
            return
        settle()
        ended = time.perf_counter()
        # A loop by hand does not ask for deterministic kernels.
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
        for _ in range(self.every):
            next(self.bare)
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        settle()
        self.ours.append(ended - self._started)
        self._started = time.perf_counter()
        self.theirs.append(self._started - ended)

    def after_batches(self, run) -> None:
        """From now on the batches of a train_graceful.Run are counted here."""
        batches = run.batches

        def counted(*arguments: object, **keywords: object) -> Iterator:
            for batch in batches(*arguments, **keywords):
                yield batch
                self.step()

        run.batches = counted

    def rates(self, samples: int) -> dict[str, list[float]]:
        """Samples a second over 20 steps or one block; the first of them is a warm-up."""
        block = max(1, 20 // self.every)

        def rate(seconds: list[float]) -> list[float]:
            starts = range(block, len(seconds) - block + 1, block)
            sums = [sum(seconds[start : start + block]) for start in starts]
            return [block * self.every * samples / total for total in sums]

        return {"ours": rate(self.ours), "bare": rate(self.theirs)}


def settle() -> None:
    """Waits for the GPU, if there is one, so that a time is that of the work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
