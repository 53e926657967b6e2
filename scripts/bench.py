#!/usr/bin/env python3
"""Measures what README claims about speed, each figure beside its reference, in rounds that alternate between the two.

    make bench                                       everything, most of an hour on 2 cores
    make bench ARGS="--only saving resuming"         some sections
    make bench-peers                                 with lightning, transformers and accelerate beside us

Prints a Markdown table and appends the same figures, with what they were measured on, to a file of JSON lines. Exit code
1 if a figure misses what is wanted of it.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import platform
import re
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ptyprocess import PtyProcess

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_graceful.py"
MIB, GIB = 2**20, 2**30
NEVER = 10**9
PATIENCE_SECONDS = 300  # with a program that says nothing
TINY = "--context 16 --layers 2 --heads 2 --dim 16 --experts 2 --batch-size 4".split()
ENDLESS = ["--steps", NEVER, "--save-every", NEVER, "--eval-every", NEVER]
LEARNING_RATES = (1e-3, 2e-3, 3e-3, 4e-3, 6e-3)  # the grid for AdamW


@dataclasses.dataclass
class Figure:
    """One row: what was measured round by round, its reference, and the limit that the verdict compares with.

    Where there is a reference the verdict is on the median of the rounds' own ratios, ours / reference.
    """

    section: str
    name: str
    unit: str
    ours: list[float]
    limit: float
    reference: list[float] | None = None
    at_least: bool = False  # else at most
    verdict_on: Callable[[list[float]], float] = statistics.median

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.ours, self.reference)] if self.reference else []

    @property
    def value(self) -> float:
        return self.verdict_on(self.ratios or self.ours)

    @property
    def good(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def row(self) -> str:
        ratio = f"{self.value:.3f} ({min(self.ratios):.2f}-{max(self.ratios):.2f})" if self.reference else ""
        wanted = f"{'≥' if self.at_least else '≤'} {self.limit:g}{'' if self.reference else ' ' + self.unit}"
        return (f"| {self.name} | {spread(self.ours, self.unit)} | {spread(self.reference, self.unit) if self.reference else ''} | "
                f"{ratio} | {wanted} | {'yes' if self.good else '**no**'} |")


def spread(values: list[float], unit: str) -> str:
    """median (smallest-largest) unit"""
    def short(value: float) -> str:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

    middle = short(statistics.median(values))
    return f"{middle} {unit}" if min(values) == max(values) else f"{middle} ({short(min(values))}-{short(max(values))}) {unit}"


def percentile(fraction: float) -> Callable[[list[float]], float]:
    return lambda values: sorted(values)[min(len(values) - 1, math.ceil(fraction * len(values)) - 1)]


def interleaved(rounds: int, *measures: Callable[[], float]) -> list[list[float]]:
    """Each measure once a round, in an order that rotates; one list of results for each."""
    results: list[list[float]] = [[] for _ in measures]
    for number in range(rounds):
        for i in range(len(measures)):
            which = (number + i) % len(measures)
            results[which].append(measures[which]())
    return results


class Terminal:
    """A command on a pseudo-terminal of its own, read as it writes, with the time at which each text arrived."""

    def __init__(self, command: Sequence[object]) -> None:
        self.process = PtyProcess.spawn([str(word) for word in command], dimensions=(24, 120))
        self.text = b""

    def wait_for(self, text: str) -> float:
        """When text arrived; what follows it is looked at next. Raises EOFError, with all output, where it never does."""
        while text.encode() not in self.text:
            try:
                if not select.select([self.process.fd], [], [], PATIENCE_SECONDS)[0]:
                    raise EOFError(f"{self.text.decode(errors='replace')}\nno {text!r} in {PATIENCE_SECONDS} s")
                self.text += os.read(self.process.fd, 65536)
            except OSError:
                raise EOFError(self.text.decode(errors="replace")) from None
        now = time.perf_counter()
        self.text = self.text.partition(text.encode())[2]
        return now

    def wait_gone(self) -> float:
        """When the process had left the process table."""
        with contextlib.suppress(OSError):
            while data := os.read(self.process.fd, 65536):
                self.text += data
        os.waitpid(self.process.pid, 0)
        now = time.perf_counter()
        self.process.terminated, self.process.status = True, 0
        self.process.fileobj.close()
        return now


def ours(*options: object) -> list[object]:
    return [sys.executable, SCRIPT, *options]


def child(name: str, processes: int | None = None, **arguments: object) -> dict:
    """What the function child_NAME of this file returns, run in a process (or some under torchrun) and on a terminal of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    with tempfile.NamedTemporaryFile("r") as result:
        terminal = Terminal([sys.executable, *launcher, __file__, "--child", name, json.dumps(arguments, default=str), result.name])
        terminal.wait_gone()
        text = result.read()
    if not text:
        raise RuntimeError(f"{name} failed:\n{terminal.text.decode(errors='replace')}")
    return json.loads(text)


def peak_reset() -> None:
    """From here on VmHWM is a new peak (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def memory(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes (Linux)."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


# ---- 1 watching, 2 hearing, 3 leaving -------------------------------------------------------------------------------


def context_switches(thread: int) -> int:
    status = Path(f"/proc/self/task/{thread}/status").read_text()
    return sum(map(int, re.findall(r"ctxt_switches:\s+(\d+)", status)))


def child_watching(seconds: float) -> dict:
    import timeit

    import train_graceful as t

    with t.ExitMonitor() as monitor:
        check = min(timeit.repeat("monitor.exit_requested", globals={"monitor": monitor}, number=10**6, repeat=5)) * 1e3
        thread = monitor._thread.native_id
        before = context_switches(thread)
        time.sleep(seconds)
        return {"check": check, "wakeups": context_switches(thread) - before}


def started_run(options: Sequence[object], monitor, screen, processes=None):
    """A Run of the program as main would make it, begun."""
    import train_graceful as t

    settings = t.parse_options([str(word) for word in options])
    del settings["no_keyboard"]
    processes, resumed = processes or t.Processes(monitor), None
    if settings["resume"]:
        resumed = t.checkpoint_to_resume(settings["resume"], "", processes, screen.say)
    run = t.prepare(settings, resumed, processes, screen)
    run.begin()
    return run


class Enough(Exception):
    """All that is to be measured has been."""


class Alternating:
    """The run's data, but after each batch of the training loop a step of another loop is taken; both are timed.

    What lies between two batches is all that the loop does for one, the next batch included.
    """

    def __init__(self, data, other_step: Callable[[], object], steps: int) -> None:
        self.data, self.other_step, self.steps = data, other_step, steps
        self.times: list[float] = []
        self.other_times: list[float] = []

    def __getattr__(self, name: str):
        return getattr(self.data, name)

    def batches(self, epoch: int, start: int, pin_memory: bool = False) -> Iterator:
        batches = self.data.batches(epoch, start, pin_memory)
        for _ in range(self.steps):
            started = time.perf_counter()
            yield next(batches)
            settle()
            ended = time.perf_counter()
            self.other_step()
            settle()
            self.times.append(ended - started)
            self.other_times.append(time.perf_counter() - ended)
        raise Enough


def settle() -> None:
    """Waits for the GPU, where there is one, so that a time is that of the work."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def bare_loop(config, data, device) -> Iterator[None]:
    """The loop that a PyTorch user writes by hand; one step for every next()."""
    import torch

    import train_graceful as t

    torch.manual_seed(config.seed)
    model = t.ByteLM(config, torch.bfloat16 if device.type == "cuda" else torch.float32).to(device)
    if config.compile:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    scheduler = t.warmup_decay(optimizer, config.warmup_steps, config.steps, t.cosine)
    loader = torch.utils.data.DataLoader(data, batch_size=None, sampler=range(NEVER), pin_memory=device.type == "cuda")
    for step, batch in enumerate(loader):
        windows = batch.to(device, non_blocking=True).long()
        logits, _ = model(windows[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        scheduler.step()
        if step % config.log_every == 0:
            print(f"\rstep {step} loss {loss.item():.4f}", end="", flush=True)
        yield


def rates(times: Sequence[float], block: int, tokens: int) -> list[float]:
    """Tokens a second of each block of so many steps, seconds and tokens of a step given; the first block is a warm-up."""
    return [block * tokens / sum(times[i : i + block]) for i in range(block, len(times) - block + 1, block)]


def child_throughput(options: list, steps: int, block: int) -> dict:
    import train_graceful as t

    screen = t.Screen()
    with t.ExitMonitor(screen) as monitor:
        run = started_run([*options, *ENDLESS], monitor, screen)
        bare = bare_loop(run.config, run.data, run.device)
        data = Alternating(run.data, lambda: next(bare), block + steps)
        with contextlib.suppress(Enough):
            t.standard_training_loop(run, run.model, run.controller.optimizers["adamw"], run.controller.schedulers["adamw"], data, monitor)
    tokens = run.data.windows_per_batch * run.config.context
    return {"ours": rates(data.times, block, tokens), "bare": rates(data.other_times, block, tokens)}


def watching(scale: float, folder: Path) -> Iterator[Figure]:
    watched = child("watching", seconds=10 * scale)
    yield Figure("watching", "exit check, once a batch", "ns", [watched["check"]], 200)
    yield Figure("watching", f"wake-ups of the idle monitor in {10 * scale:g} s", "", [watched["wakeups"]], 0)
    measured = child("throughput", options=["--checkpoint-dir", folder], steps=round(200 * scale), block=max(2, round(20 * scale)))
    yield Figure("watching", "training with monitor, metrics and status line / bare loop", "tokens/s", measured["ours"], 0.99,
                 measured["bare"], at_least=True)


def child_hearing() -> dict:
    """Its main thread is never outside a long matrix product; every request is taken back, so that the next one is heard."""
    import torch

    import train_graceful as t

    class Forgetful(t.ExitMonitor):
        def request(self, reason: str, exit_code: int) -> None:
            super().request(reason, exit_code)
            self.withdraw(reason)
            self._interrupts = 0

    a = torch.rand(4096, 4096)
    with Forgetful() as monitor:
        print("@ready", flush=True)
        while monitor._listening and not monitor.save_requested:  # until asked to end, or left alone
            torch.mm(a, a)
    return {}


def hearing(scale: float, folder: Path) -> Iterator[Figure]:
    with tempfile.NamedTemporaryFile("r") as result:
        terminal = Terminal([sys.executable, __file__, "--child", "hearing", "{}", result.name])
        terminal.wait_for("@ready")
        requests = {"q + Enter": lambda: os.write(terminal.process.fd, b"q\n")}
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if not (signum == signal.SIGHUP and signal.getsignal(signum) is signal.SIG_IGN):  # nohup's promise, which the program keeps
                requests[signum.name] = lambda signum=signum: os.kill(terminal.process.pid, signum)

        def heard(ask: Callable[[], object]) -> float:
            # At a random point of the matrix product: a person does not wait for its end.
            time.sleep(0.01 + 0.03 * (time.perf_counter_ns() % 1000) / 1000)
            started = time.perf_counter()
            ask()
            return 1e3 * (terminal.wait_for("Exit requested!") - started)

        times = interleaved(round(200 * scale), *[lambda ask=ask: heard(ask) for ask in requests.values()])
        os.write(terminal.process.fd, b"s\n")
        terminal.wait_gone()
    for name, milliseconds in zip(requests, times):
        yield Figure("hearing", f"{name} to \"Exit requested\", both cores in one matrix product: median", "ms", milliseconds, 5)
        yield Figure("hearing", f"{name}: 99th percentile", "ms", [percentile(0.99)(milliseconds)], 20)


def leaving(scale: float, folder: Path) -> Iterator[Figure]:
    def leave(workers: int) -> float:
        terminal = Terminal(ours(*TINY, *ENDLESS, "--workers", workers, "--checkpoint-dir", folder / str(workers)))
        terminal.wait_for("step ")
        terminal.wait_for("step ")
        os.write(terminal.process.fd, b"q\n")
        requested, saving = terminal.wait_for("Exit requested!"), terminal.wait_for("Saving emergency")
        saved = terminal.wait_for("saved: ")
        return terminal.wait_gone() - requested - (saved - saving)

    without, with_two = interleaved(max(2, round(10 * scale)), lambda: leave(0), lambda: leave(2))
    yield Figure("leaving", "from \"Exit requested\" to the process gone, less the save", "s", without, 0.3)
    yield Figure("leaving", "the same with --workers 2", "s", with_two, 0.6)


# ---- 4 saving, 5 periodic saves --------------------------------------------------------------------------------------


def model_options(scale: float, layers: int, dim: int) -> list[object]:
    """A model of the wanted size for scale 1; its state is 144 * layers * dim**2 bytes and a little."""
    return ["--dim", max(16, round(dim * scale**0.5 / 16) * 16), "--layers", layers, "--context", 64, "--batch-size", 1]


def trained_state(options: Sequence[object]) -> dict:
    """Weights and optimizer states as after a step, and no gradients."""
    import torch

    import train_graceful as t

    settings = t.parse_options([str(word) for word in options])
    config = t.Config.from_options({key: value for key, value in settings.items() if key not in ("resume", "no_keyboard")})
    model = t.ByteLM(config)
    controller = t.StandardTrainingController(model, config, 100)
    controller.training_step(torch.randint(0, 256, (config.batch_size, config.context + 1), dtype=torch.uint8))
    controller.optimizers["adamw"].zero_grad()
    return {"model_state_dict": model.state_dict(), **controller.state_dict()}


def tensors_in(value: object) -> Iterator:
    """Every tensor in nested dicts and lists."""
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)
    elif hasattr(value, "untyped_storage"):
        yield value


def flushed(write: Callable[[object], None], path: Path) -> float:
    """Seconds of writing a new file and flushing it; the file is deleted, and the disk quiet, before the next."""
    os.sync()
    started = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        write(file)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def our_save(state: dict, path: Path) -> float:
    """The same of save_checkpoint."""
    import train_graceful as t

    os.sync()
    started = time.perf_counter()
    t.save_checkpoint(state, path)
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def child_saving(options: list, folder: str, rounds: int) -> dict:
    import torch

    import train_graceful as t

    state = trained_state(options)
    tensors = list(tensors_in(state))
    size = sum(tensor.nbytes for tensor in tensors)
    path = Path(folder, "saved.pt")

    def raw(file) -> None:
        for tensor in tensors:
            data = memoryview(tensor.numpy().reshape(-1)).cast("B")
            while data:
                data = data[file.write(data) :]

    def loaded(load: Callable[[Path], object]) -> float:
        started = time.perf_counter()
        load(path)
        return size / GIB / (time.perf_counter() - started)

    peak_reset()
    before = memory("VmRSS")
    our_save(state, path)
    extra = max(0, memory("VmHWM") - before)
    plain, saved, torchs = interleaved(
        rounds, lambda: flushed(raw, path), lambda: our_save(state, path), lambda: flushed(lambda file: torch.save(state, file), path))
    t.save_checkpoint(state, path)
    verified, unverified = interleaved(
        rounds, lambda: loaded(t.load_checkpoint), lambda: loaded(lambda path: torch.load(path, weights_only=True)))
    path.unlink()
    return {"size": size, "extra": extra / size, "raw": [size / GIB / seconds for seconds in plain],
            "ours": [size / GIB / seconds for seconds in saved], "torch": [size / GIB / seconds for seconds in torchs],
            "verified": verified, "unverified": unverified}


def saving(scale: float, folder: Path) -> Iterator[Figure]:
    """On the disk, and on a file system in memory where there is one."""
    folder.mkdir()
    for where in (folder, Path("/dev/shm")):
        if not where.is_dir():
            continue
        with tempfile.TemporaryDirectory(dir=where) as target:
            measured = child("saving", options=model_options(scale, 8, 1024), folder=target, rounds=max(2, round(9 * scale)))
        place = "on the disk" if where == folder else "in memory"
        what = f"save of {measured['size'] / GIB:.2f} GiB, checksummed, {place}"
        yield Figure("saving", f"{what} / plain write by one thread + fsync", "GiB/s", measured["ours"], 1.2, measured["raw"], at_least=True)
        yield Figure("saving", f"{what} / torch.save + fsync", "GiB/s", measured["ours"], 2.0, measured["torch"], at_least=True)
        yield Figure("saving", f"load of it, verified, the file cached, {place} / torch.load without verification", "GiB/s", measured["verified"], 1.2,
                     measured["unverified"], at_least=True)
    yield Figure("saving", "peak extra memory of that save, of the state", "", [measured["extra"]], 0.05)


def child_periodic(options: list, every: int, rounds: int) -> dict:
    """Blocks of `every` steps whose first one saves, and as many without a save, in turn."""
    import torch

    import train_graceful as t

    screen = t.Screen()
    with t.ExitMonitor(screen) as monitor:
        run = started_run([*options, *ENDLESS], monitor, screen)
        batches = run.data.batches(0, 0)

        def save() -> float:
            """The stall: what the loop waits for before it goes on."""
            started = time.perf_counter()
            run.writer.submit(run.state_dict(None), {"periodic": f"step_{run.step}.pt"})
            return time.perf_counter() - started

        def block(saves: bool) -> float:
            run.writer.wait()
            started = time.perf_counter()
            if saves:
                save()
            for _ in range(every):
                run.batch_done(run.controller.training_step(next(batches)))
            return every * run.data.windows_per_batch * run.config.context / (time.perf_counter() - started)

        block(saves=False)
        tensors = list(tensors_in(run.state_dict(None)))
        size = sum(tensor.nbytes for tensor in tensors)
        peak_reset()
        before = memory("VmRSS")
        for _ in range(3):
            save()
            run.writer.wait()
        extra = max(0, memory("VmHWM") - before)
        with_saves, without = interleaved(rounds, lambda: block(saves=True), lambda: block(saves=False))
        host = [torch.empty_like(tensor) for tensor in tensors]

        def copy() -> float:
            started = time.perf_counter()
            for target, source in zip(host, tensors):
                target.copy_(source)
            return time.perf_counter() - started

        def stall() -> float:
            seconds = save()
            run.writer.wait()
            return seconds

        copy()
        stalls, copies = interleaved(3 * rounds, stall, copy)
    return {"size": size, "extra": extra / size, "stalls": stalls, "copies": copies, "with": with_saves, "without": without}


def periodic(scale: float, folder: Path) -> Iterator[Figure]:
    measured = child("periodic", options=["--checkpoint-dir", folder, *model_options(scale, 6, 512), "--batch-size", 8, "--keep", 1],
                     every=max(2, round(50 * scale)), rounds=max(2, round(5 * scale)))
    size = f"{measured['size'] / MIB:.0f} MiB"
    yield Figure("periodic", f"stall of the loop for a periodic save of {size} / one copy in memory", "s", measured["stalls"], 1.3, measured["copies"])
    yield Figure("periodic", "training with such a save every 50 steps / without", "tokens/s", measured["with"], 0.97, measured["without"], at_least=True)
    yield Figure("periodic", "memory of the saves, of the state", "", [measured["extra"]], 1.05)
    measured = child("periodic", options=["--checkpoint-dir", folder / "default", "--keep", 1], every=1, rounds=max(2, round(60 * scale)))
    yield Figure("periodic", "training of the default model with a save after every step / without", "tokens/s", measured["with"], 0.95,
                 measured["without"], at_least=True)


# ---- 6 resuming ------------------------------------------------------------------------------------------------------


def until_line(command: Sequence[object], start: str, lines: int = 1) -> tuple[float, float]:
    """Seconds from the start of a process to its first line that begins so; its peak memory at the last of them, in bytes."""
    started = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    seconds = None
    for line in process.stdout:
        if line.startswith(start):
            seconds = seconds or time.perf_counter() - started
            lines -= 1
            if not lines:
                break
    else:
        raise RuntimeError(f"{command} ended without {start!r}")
    process.kill()
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = -9
    process.stdout.close()
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def first_batch(*options: object, batches: int = 1) -> tuple[float, float]:
    """Seconds from the start of the program to the end of its first batch; its peak memory after some batches."""
    return until_line(ours(*options, *ENDLESS, "--log-every", 1), "step ", batches)


def read_and_verify(path: Path) -> float:
    """As one would by hand: into memory, and a checksum of it."""
    started = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        data = bytearray(os.fstat(file.fileno()).st_size)
        view = memoryview(data)
        while view:
            view = view[file.readinto(view) :]
    zlib.crc32(data)
    return time.perf_counter() - started


def moved(checkpoint: Path, batch: int, to: Path) -> None:
    """The checkpoint of a run that has come to another batch of its first epoch; its weights stay as they are."""
    import train_graceful as t

    state = t.load_checkpoint(checkpoint)
    state["step"] = state["batch_in_epoch"] = batch
    state["epoch"] = 0
    t.save_checkpoint(state, to)


def resuming(scale: float, folder: Path) -> Iterator[Figure]:
    rounds = max(2, round(7 * scale))
    options = [*model_options(scale, 8, 1024), "--checkpoint-dir", folder]
    subprocess.run([str(word) for word in ours(*options, "--steps", 1, "--no-keyboard")], check=True, stdout=subprocess.DEVNULL)
    checkpoint = folder / "final.pt"
    peaks: dict[str, list[float]] = {"fresh": [], "resumed": []}

    def start(kind: str, *arguments: object) -> float:
        seconds, peak = first_batch(*arguments, batches=3)
        peaks[kind].append(peak / MIB)
        return seconds

    fresh, resumed, read = interleaved(rounds, lambda: start("fresh", *options, "--checkpoint-dir", folder / "fresh"),
                                       lambda: start("resumed", "--resume", "latest", "--checkpoint-dir", folder),
                                       lambda: read_and_verify(checkpoint))
    size = checkpoint.stat().st_size / GIB
    yield Figure("resuming", f"first batch after resuming {size:.2f} GiB, less that of a fresh start / one read + verify", "s",
                 [max(0.0, b - a) for a, b in zip(fresh, resumed)], 1.5, read)
    yield Figure("resuming", "peak memory of the resumed run / of the fresh one", "MiB", peaks["resumed"], 1.1, peaks["fresh"])
    shutil.rmtree(folder)
    small = folder.with_name("small")
    subprocess.run([str(word) for word in ours(*TINY, "--steps", 12, "--checkpoint-dir", small)], check=True, stdout=subprocess.DEVNULL,
                   stdin=subprocess.DEVNULL)
    late_batch = 10_000 if scale == 1 else 1_000
    for batch in (10, late_batch):
        moved(small / "final.pt", batch, small / f"at_{batch}.pt")
    late, early = interleaved(2 * rounds, *[lambda batch=batch: first_batch("--resume", small / f"at_{batch}.pt", "--checkpoint-dir",
                              folder.with_name(f"at_{batch}"))[0] for batch in (late_batch, 10)])
    yield Figure("resuming", f"first batch after resuming at batch {late_batch:,} / at batch 10", "s", late, 1.05, early)


# ---- 7 the geometric mode --------------------------------------------------------------------------------------------


def child_step_cost(batch_size: int, rounds: int) -> dict:
    import torch

    import train_graceful as t

    def controller(mode: str, kind):
        torch.manual_seed(0)
        config = t.Config.from_options({"mode": mode, "batch_size": batch_size})
        return kind(t.ByteLM(config), config, 2000)

    class RotationsAlone(t.GeometricTrainingController):
        """Rotated experts and the geometric losses, but the standard mode's one AdamW."""

        def __init__(self, model, config, total_steps) -> None:
            super().__init__(model, config, total_steps)
            self.optimizers = {"adamw": torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)}
            self.schedulers = {"adamw": t.warmup_decay(self.optimizers["adamw"], config.warmup_steps, total_steps, t.cubic)}

    controllers = [controller("standard", t.StandardTrainingController), controller("geometric", RotationsAlone),
                   controller("geometric", t.GeometricTrainingController)]
    batch = t.ByteDataset(controllers[0].config)[0]

    def step(controller) -> float:
        started = time.perf_counter()
        controller.training_step(batch)
        settle()
        return time.perf_counter() - started

    measures = [lambda controller=controller: step(controller) for controller in controllers]
    interleaved(3, *measures)
    standard, rotations, geometric = interleaved(rounds, *measures)
    return {"standard": standard, "rotations": rotations, "geometric": geometric}


def step_cost(scale: float, folder: Path) -> Iterator[Figure]:
    for batch_size in (16, 32):
        measured = child("step_cost", batch_size=batch_size, rounds=max(3, round(40 * scale)))
        ms = {name: [1e3 * seconds for seconds in values] for name, values in measured.items()}
        yield Figure("step_cost", f"a step with the rotations alone / a standard step, batch {batch_size}", "ms", ms["rotations"], 1.05, ms["standard"])
        yield Figure("step_cost", f"a geometric step, three optimizers / a standard step, batch {batch_size}", "ms", ms["geometric"], 1.15, ms["standard"])


def losses(directory: Path) -> list[tuple[int, float]]:
    """(step, validation loss) of every evaluation."""
    rows = [line.split(",") for line in (directory / "metrics.csv").read_text().splitlines()[1:]]
    return [(int(row[0]), float(row[3])) for row in rows if row[3]]


def convergence(scale: float, folder: Path) -> Iterator[Figure]:
    """Default runs, as many at a time as there are cores, with one thread each: what is measured here is no time."""
    steps = round(2000 * scale)
    sizes = [] if scale == 1 else [*TINY, "--steps", steps, "--warmup-steps", 2]
    seeds = range(3 if scale == 1 else 1)

    def runs(variants: dict[str, list[object]]) -> None:
        waiting, running = list(variants.items()), []
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                name, options = waiting.pop(0)
                running.append(subprocess.Popen(
                    [str(word) for word in ours(*sizes, *options, "--eval-every", max(1, steps // 80), "--save-every", NEVER,
                                                "--checkpoint-dir", folder / name)],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}))
            pid, status = os.waitpid(-1, 0)
            for process in [process for process in running if process.pid == pid]:
                process.returncode = os.waitstatus_to_exitcode(status)
                running.remove(process)
                if process.returncode:
                    raise RuntimeError(f"{process.args} ended with {process.returncode}")

    grid = LEARNING_RATES if scale == 1 else LEARNING_RATES[:2]
    runs({f"lr_{lr:g}": ["--lr", lr] for lr in grid})
    finals = {lr: losses(folder / f"lr_{lr:g}")[-1][1] for lr in grid}
    best = min(finals, key=finals.get)
    print("AdamW after", steps, "steps, seed 0:", ", ".join(f"lr {lr:g}: {loss:.4f}" for lr, loss in finals.items()), flush=True)
    runs({f"geometric_{seed}": ["--mode", "geometric", "--seed", seed] for seed in seeds}
         | {f"standard_{seed}": ["--lr", best, "--seed", seed] for seed in seeds})
    reached, whole = [], []
    for seed in seeds:
        target = losses(folder / f"standard_{seed}")[-1][1]
        curve = losses(folder / f"geometric_{seed}")
        reached.append(float(next((step for step, loss in curve if loss <= target), NEVER)))
        whole.append(float(steps))
        print(f"seed {seed}: standard {target:.4f} after {steps} steps; geometric there after {reached[-1]:.0f}, "
              f"{curve[-1][1]:.4f} after {steps}", flush=True)
    yield Figure("convergence", f"steps of the geometric mode to the loss of AdamW (lr {best:g}, best of "
                 f"{', '.join(f'{lr:g}: {loss:.3f}' for lr, loss in finals.items())}) / AdamW's", "steps", reached, 0.55, whole)


# ---- 8 data ----------------------------------------------------------------------------------------------------------


def child_data(path: str, batches: int, steps: int) -> dict:
    import train_graceful as t

    started = time.perf_counter()
    config = t.Config.from_options({"data": (path,)})
    data = t.ByteDataset(config)
    data.fingerprint()
    iterator = data.batches(0, 0)
    next(iterator)
    first = time.perf_counter() - started
    fetching, training = [], []
    controller = t.StandardTrainingController(t.ByteLM(config), config, 100)
    for _ in range(steps):
        times = [time.perf_counter()]
        batch = next(iterator)
        times.append(time.perf_counter())
        controller.training_step(batch)
        times.append(time.perf_counter())
        fetching.append(times[1] - times[0])
        training.append(times[2] - times[0])
    for _ in range(min(batches, data.batches_per_epoch - steps - 1)):
        next(iterator)
    return {"first": first, "share": [a / b for a, b in zip(fetching, training)], "memory": memory("VmRSS") / MIB}


def data(scale: float, folder: Path) -> Iterator[Figure]:
    folder.mkdir()
    block = os.urandom(MIB)
    sizes = {"large": max(4, round(2048 * scale)), "small": 4}
    for name, mebibytes in sizes.items():
        with open(folder / name, "wb") as file:
            for _ in range(mebibytes):
                file.write(block)
    rounds = max(1, round(3 * scale))
    measured: dict[str, list[dict]] = {name: [] for name in sizes}
    interleaved(rounds, *[lambda name=name: measured[name].append(
        child("data", path=folder / name, batches=round(20_000 * scale), steps=max(3, round(30 * scale)))) for name in sizes])
    what = f"a mapped file of {sizes['large'] / 1024:g} GiB"
    yield Figure("data", f"opening {what}, first batch included", "s", [result["first"] for result in measured["large"]], 1)
    yield Figure("data", f"memory after 20,000 batches of {what}, less that with 4 MiB", "MiB",
                 [a["memory"] - b["memory"] for a, b in zip(measured["large"], measured["small"])], 300)
    yield Figure("data", "the loader's share of a default step", "", [share for result in measured["large"] for share in result["share"]], 0.02)


# ---- start-up and growth ---------------------------------------------------------------------------------------------


BARE_START = """
import sys, sysconfig
from pathlib import Path
import torch
sys.path.insert(0, {root!r})
from train_graceful import ByteLM, Config
files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
skipped = {{"site-packages", "dist-packages", "test", "tests", "idle_test"}}
text = b"".join(file.read_bytes() for file in files if not skipped & set(file.parts))
data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
model = ByteLM(Config.from_options({{}}))
if {optimizer}:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
starts = torch.randint(len(data) - 129, (16,))
windows = torch.stack([data[start : start + 129] for start in starts]).long()
logits, _ = model(windows[:, :-1])
loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
loss.backward()
if {optimizer}:
    optimizer.step()
print("step 1 loss", loss.item(), flush=True)
"""


def seconds_of(*command: object, code: int = 0) -> float:
    started = time.perf_counter()
    result = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, capture_output=True)
    seconds = time.perf_counter() - started
    assert result.returncode == code, result
    return seconds


def startup(scale: float, folder: Path) -> Iterator[Figure]:
    rounds = max(2, round(11 * scale))
    imported, helped, wrong = interleaved(rounds, lambda: seconds_of(sys.executable, "-c", "import torch"),
                                          lambda: seconds_of(*ours("--help")), lambda: seconds_of(*ours("--batch-siez", 4), code=2))
    yield Figure("startup", "--help / import torch", "s", helped, 1.1, imported)
    yield Figure("startup", "a usage error / import torch", "s", wrong, 1.1, imported)
    def bare_start(optimizer: bool) -> float:
        return until_line([sys.executable, "-c", BARE_START.format(root=str(ROOT), optimizer=optimizer)], "step ")[0]

    fresh, bare, no_optimizer = interleaved(rounds, lambda: first_batch("--checkpoint-dir", folder)[0], lambda: bare_start(True),
                                            lambda: bare_start(False))
    what = "fresh start to the end of the first batch / the same model, data and batch in a bare script"
    yield Figure("startup", f"{what}, with its optimizer", "s", fresh, 1.2, bare)
    yield Figure("startup", f"{what}, without an optimizer", "s", fresh, 1.2, no_optimizer)


def child_growth(folder: str, factors: list[int], steps: int) -> dict:
    """One small run at each size, in one process, a step of each in turn."""
    import train_graceful as t

    screen = t.Screen()
    result: dict[str, list[list[float]]] = {"step": [], "save": []}
    with contextlib.ExitStack() as stack:
        runs = []
        for factor in factors:
            monitor = t.ExitMonitor(screen, keyboard=False)
            monitor.save_requested = False
            run = started_run(["--resume", Path(folder, f"{factor}/final.pt"), *ENDLESS, "--log-every", 1], monitor, screen)
            runs.append((run, run.data.batches(run.epoch, run.batch_in_epoch)))
            stack.callback(run.close)

        def step(run, batches) -> float:
            started = time.perf_counter()
            run.batch_done(run.controller.training_step(next(batches)))
            return time.perf_counter() - started

        def save(run, batches) -> float:
            run.step += 1  # a new name each time
            started = time.perf_counter()
            run._save(run.state_dict("periodic"), f"step_{run.step}.pt")
            return time.perf_counter() - started

        interleaved(5, *[lambda run=run: step(*run) for run in runs])
        result["step"] = interleaved(steps, *[lambda run=run: step(*run) for run in runs])
        interleaved(3, *[lambda run=run: save(*run) for run in runs])
        result["save"] = interleaved(max(5, steps // 10), *[lambda run=run: save(*run) for run in runs])
    return result


def growth(scale: float, folder: Path) -> Iterator[Figure]:
    """Everything that grows, at 10 and 100 times: data files, rows of metrics.csv, others' checkpoints, steps done."""
    import train_graceful as t

    factors = [1, 10, 100] if scale == 1 else [1, 10]
    text = b"".join(b"%d squared is %d\n" % (n, n * n) for n in range(300_000))
    for factor in factors:
        home, corpus = folder / str(factor), folder / f"data_{factor}"
        corpus.mkdir(parents=True)
        files = 10 * factor
        for number in range(files):
            (corpus / f"{number:05}.txt").write_bytes(text[number * len(text) // files : (number + 1) * len(text) // files])
        subprocess.run([str(word) for word in ours(*TINY, "--data", corpus, "--steps", 20, "--log-every", 1, "--checkpoint-dir", home)],
                       check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        steps = 200 * factor
        state = t.load_checkpoint(home / "final.pt")
        batches = t.ByteDataset(t.Config.from_options({}, state["config"])).batches_per_epoch
        state["step"], state["epoch"], state["batch_in_epoch"] = steps, steps // batches, steps % batches
        (home / "final.pt").unlink()  # not to be numbered
        t.save_checkpoint(state, home / "final.pt")
        header, row = (home / "metrics.csv").read_text().splitlines()[:2]
        rest = row.partition(",")[2]
        (home / "metrics.csv").write_text("\n".join([header, *(f"{step},{rest}" for step in range(1, steps + 1))]) + "\n")
        state["run_id"] = "0" * 12
        t.save_checkpoint(state, home / "step_100_2.pt")
        for number in range(3 * factor):
            shutil.copyfile(home / "step_100_2.pt", home / f"step_{steps + 7 + number}.pt")
    measured = child("growth", folder=folder, factors=factors, steps=max(10, round(300 * scale)))
    resumed = interleaved(max(2, round(7 * scale)), *[
        lambda factor=factor: first_batch("--resume", folder / f"{factor}/final.pt")[0] for factor in factors])
    for number, factor in enumerate(factors[1:], start=1):
        for what, unit, values in (("step", "ms", measured["step"]), ("save", "ms", measured["save"]), ("resume to the first batch", "s", resumed)):
            times = [[(1e3 if unit == "ms" else 1) * seconds for seconds in values[i]] for i in (number, 0)]
            yield Figure("growth", f"a {what} with {factor}x the steps, epochs, data files, checkpoints and rows", unit, times[0], 1.1, times[1])


# ---- many processes --------------------------------------------------------------------------------------------------


def child_agreement(folder: str, options: list, steps: int) -> dict:
    """How long the loop waits for the others' requests between two batches."""
    import train_graceful as t

    screen, times = t.Screen(shown=False), []
    with t.ExitMonitor(screen, keyboard=False) as monitor:
        processes = t.ManyProcesses(monitor)
        run = started_run([*options, *ENDLESS, "--checkpoint-dir", folder], monitor, screen, processes)
        agree = processes.agree

        def timed() -> None:
            started = time.perf_counter()
            agree()
            times.append(1e3 * (time.perf_counter() - started))

        processes.agree = timed
        batches = run.data.batches(0, 0)
        for _ in range(5 + steps):
            run.batch_done(run.controller.training_step(next(batches)))
        processes.close()
        return {"times": times[5:]}


def child_sharded(folder: str, options: list, saves: int) -> dict:
    """What rank 0 of a sharded run holds and writes, how long a save takes, beside one process that saves all of it, and an agreement."""
    import torch
    import torch.distributed as dist

    import train_graceful as t

    screen, times = t.Screen(shown=False), {"write_parts": [], "save": [], "whole": [], "agreement": []}
    write_parts, sizes = t.write_parts, []

    def timed(parts, path) -> list[int]:
        started = time.perf_counter()
        checksums = write_parts(parts, path)
        times["write_parts"].append(time.perf_counter() - started)
        sizes.append(sum(len(part.data) for part in parts))
        return checksums

    with t.ExitMonitor(screen, keyboard=False) as monitor:
        processes = t.ManyProcesses(monitor)
        processes.shard()
        run = started_run(["--shard", *options, *ENDLESS, "--checkpoint-dir", folder], monitor, screen, processes)
        batches = run.data.batches(0, 0)
        for _ in range(3):
            run.batch_done(run.controller.training_step(next(batches)))
            run.writer.submit(processes.rows(run.state_dict(None)), {"periodic": "step_1.pt"})
        run.writer.wait()
        peak = memory("VmHWM")
        state = processes.rows(run.state_dict("periodic"))
        whole = t.mapped(state, lambda value: torch.zeros(value.shape, dtype=value.local.dtype) if isinstance(value, t.Rows) else value)
        t.write_parts, shared = timed, Path(folder, "shared.pt")
        for _ in range(saves):
            shared.unlink(missing_ok=True)
            os.sync()
            dist.barrier()
            started = time.perf_counter()
            processes.begin_save()
            t.write_checkpoint(state, shared, processes)
            times["save"].append(time.perf_counter() - started)
            dist.barrier()
            t.write_parts = write_parts
            if processes.rank == 0:
                times["whole"].append(our_save(whole, Path(folder, "whole.pt")))
            t.write_parts = timed
            dist.barrier()
        for _ in range(500):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(torch.zeros(2, dtype=torch.int64), dist.ReduceOp.MAX)
            times["agreement"].append(time.perf_counter() - started)
        parameters = sum(parameter.numel() for parameter in run.model.parameters())
        run.close()
        processes.close()
        processes.wait_for_others()
        return {**times, "peak": peak, "size": sizes[-1], "parameters": parameters}


def many(scale: float, folder: Path) -> Iterator[Figure]:
    options = [] if scale == 1 else TINY
    for size in (2, 4):
        times = child("agreement", size, folder=folder / str(size), options=options, steps=max(5, round(100 * scale)))["times"]
        yield Figure("many", f"agreement of {size} processes on leaving, waited for in a step", "ms", times, 0.5)
    measured = child("sharded", 2, folder=folder / "sharded", options=[*model_options(scale, 8, 1024), "--batch-size", 2], saves=max(2, round(7 * scale)))
    yield Figure("many", f"save of {2 * measured['size'] / GIB:.2f} GiB by two processes, sharded / by one that has it whole", "s",
                 measured["save"], 1.0, measured["whole"])


# ---- 9 a GPU ---------------------------------------------------------------------------------------------------------


def child_gpu_saving(folder: str, gibibytes: float, rounds: int) -> dict:
    import torch

    state = {str(i): torch.randn(64 * MIB, device="cuda") for i in range(max(1, round(4 * gibibytes)))}
    path = Path(folder, "saved.pt")
    Path(folder).mkdir(parents=True, exist_ok=True)
    size = sum(tensor.nbytes for tensor in state.values()) / GIB

    def copy_and_write(file) -> None:
        for tensor in state.values():
            file.write(memoryview(tensor.cpu().numpy()).cast("B"))

    saved, plain = interleaved(rounds, lambda: our_save(state, path), lambda: flushed(copy_and_write, path))
    return {"ours": [size / seconds for seconds in saved], "reference": [size / seconds for seconds in plain]}


def gpu(scale: float, folder: Path) -> Iterator[Figure]:
    import torch

    if not torch.cuda.is_available():
        print("No CUDA device here: its figures are left out.", flush=True)
        return

    def used() -> float:
        answer = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], capture_output=True, text=True)
        return float(answer.stdout.split()[0])

    for compiled in ([], ["--compile"]):
        measured = child("throughput", options=["--device", "cuda", "--checkpoint-dir", folder / f"compile{len(compiled)}", *compiled],
                         steps=round(400 * scale), block=max(2, round(40 * scale)))
        yield Figure("gpu", f"GPU: training in bfloat16 {' '.join(compiled)} / bare loop", "tokens/s", measured["ours"], 0.99, measured["bare"],
                     at_least=True)
    saved = child("gpu_saving", folder=folder / "saving", gibibytes=10 * scale, rounds=3)
    yield Figure("gpu", f"GPU: save of {10 * scale:g} GiB from the device / copy + write + fsync", "GiB/s", saved["ours"], 1.0, saved["reference"],
                 at_least=True)
    before = used()
    terminal = Terminal(ours("--device", "cuda", *ENDLESS, "--checkpoint-dir", folder / "memory"))
    terminal.wait_for("step ")
    during = used()
    os.write(terminal.process.fd, b"q\n")
    terminal.wait_gone()
    yield Figure("gpu", f"GPU: memory still taken after q, of {during - before:.0f} MiB", "MiB", [used() - before], 0)


# ---- peers -----------------------------------------------------------------------------------------------------------


def peers(scale: float, folder: Path, python: str) -> Iterator[Figure]:
    """The same model, data and optimizer in other trainers, each step beside one of the bare loop."""
    measured: dict[str, dict] = {}
    for name in ("train_graceful", "lightning", "transformers", "accelerate"):
        answer = subprocess.run([python, str(ROOT / "scripts" / "bench_peers.py"), name, str(folder / name), str(max(60, round(200 * scale)))],
                                capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if answer.returncode:
            print(f"{name}: left out ({answer.stderr.strip().splitlines()[-1]})", flush=True)
            continue
        measured[name] = json.loads(answer.stdout.splitlines()[-1])
        yield Figure("peers", f"training with {name} / bare loop", "tokens/s", measured[name]["ours"], 0.0, measured[name]["bare"], at_least=True)
    for name in [name for name in measured if name != "train_graceful"]:
        yield Figure("peers", f"a checkpoint of the default model, written and flushed by us / written by {name}", "ms",
                     [1e3 * seconds for seconds in measured["train_graceful"]["saves"]], math.inf,
                     [1e3 * seconds for seconds in measured[name]["saves"]])


# ---- all of it -------------------------------------------------------------------------------------------------------


SECTIONS = {section.__name__: section for section in
            (watching, hearing, leaving, saving, periodic, resuming, step_cost, data, startup, growth, many, gpu, convergence)}


def machine() -> dict[str, object]:
    import torch

    with contextlib.suppress(OSError):
        names = set(re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()))
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {"date": datetime.datetime.now().isoformat(timespec="seconds"), "commit": commit, "cpu": ", ".join(sorted(names)) or platform.processor(),
            "cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version(), "torch": torch.__version__,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="sizes and rounds so small that the figures say nothing: is the benchmark whole?")
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter that has lightning, transformers and accelerate")
    parser.add_argument("--dir", default="checkpoints", help="where to write, since disks differ (default checkpoints)")
    parser.add_argument("--json", default="checkpoints/bench.jsonl", help="a line is appended to it (default checkpoints/bench.jsonl)")
    parser.add_argument("--child", nargs=3, metavar=("NAME", "ARGUMENTS", "RESULT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.child:
        name, settings, result = arguments.child
        measured = json.dumps(globals()[f"child_{name}"](**json.loads(settings)))
        if os.environ.get("RANK", "0") == "0":
            Path(result).write_text(measured)
        return 0
    scale = 0.02 if arguments.quick else 1
    figures: list[Figure] = []
    print("| figure | ours | reference | ratio | wanted | met |\n|---|---|---|---|---|---|", flush=True)
    sections = [SECTIONS[name] for name in arguments.only]
    if arguments.peers:
        sections.append(lambda scale, folder: peers(scale, folder, arguments.peers))
    for number, section in enumerate(sections):
        with tempfile.TemporaryDirectory(prefix="bench_", dir=arguments.dir) as folder:
            for figure in section(scale, Path(folder, str(number)).absolute()):
                figures.append(figure)
                print(figure.row(), flush=True)
    with open(arguments.json, "a") as file:
        rows = [{"section": figure.section, "name": figure.name, "unit": figure.unit, "value": figure.value, "limit": figure.limit, "met": figure.good,
                 "ours": figure.ours, "reference": figure.reference} for figure in figures]
        file.write(json.dumps({**machine(), "quick": arguments.quick, "figures": rows}) + "\n")
    return not arguments.quick and not all(figure.good for figure in figures)


if __name__ == "__main__":
    sys.exit(main())
