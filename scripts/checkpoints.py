#!/usr/bin/env python3
"""Looks at checkpoints, and changes nothing.

    scripts/checkpoints.py list [DIR]       a line for each in a directory (default checkpoints), the newest first
    scripts/checkpoints.py show [CKPT]      what one holds, and its configuration (default latest)
    scripts/checkpoints.py sample [CKPT]    400 bytes that the built-in model of one writes (default latest)

CKPT is a path, or `latest`: the newest whole one of --checkpoint-dir, which `list` marks with an arrow.
"""

import argparse
import codecs
import contextlib
import dataclasses
import datetime
import io
import math
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_graceful as tg

SAMPLE_BYTES = 400


def list_checkpoints(directory: str) -> None:
    """Prints a line for every checkpoint of a directory, the newest first, and marks what `latest` would take.

    What is called like a checkpoint but cannot be one (a dangling link, a pipe) is named below them. Raises UserError
    where there is neither.
    """
    if os.path.isfile(directory):
        raise tg.UserError(f"{directory} is a file; show {shlex.quote(directory)} prints what it holds")
    folder = Path(os.path.abspath(directory))
    paths = tg.checkpoints_in(folder)
    named = {path for path in (*folder.glob("*.pt"), *folder.glob("emergency_exit/*.pt")) if path.name[0] != "."}
    others = sorted(named.difference(paths))
    if not paths and not others:
        raise tg.UserError(f"{directory}: {'no checkpoints' if folder.is_dir() else 'No such file or directory'}")
    columns = "{:>7}  {:>5}  {:>7}  {:>7}  {:>8}  {:>7}  {:<6}  {:<28}  {}".format
    print(columns("step", "epoch", "loss", "best", "age", "size", "run", "reason", "checkpoint"))
    latest = " <- latest"
    for path in paths:
        try:
            status = path.stat()
            figures = figures_of(path)
        except FileNotFoundError:
            # The run has just deleted it.
            continue
        numbers, run, reason = figures[:4], figures[4], figures[5]
        age = tg.short_time(max(0.0, time.time() - status.st_mtime))
        mark = latest if run else ""
        latest = "" if run else latest
        row = columns(*numbers, age, short_size(status.st_size), run[:6], reason, os.path.relpath(path) + mark)
        print(printable(row), flush=True)
    for path in others:
        print(printable(columns("", "", "", "", "", "", "", "no checkpoint", os.path.relpath(path))))


def short_size(size: float) -> str:
    """Of bytes, in decimal units, as ls and disks count."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} GB" if size < 1000 else f"{size:,.0f} GB"


def figures_of(path: Path) -> tuple:
    """(step, epoch, loss, best, run_id, reason) of a checkpoint; empty texts and why, of what is none of this program."""
    nothing = ("", "", "", "", "")
    try:
        state = tg.load_checkpoint(path)
    except tg.CheckpointError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise error.__cause__ from None
        return *nothing, "unreadable" if isinstance(error.__cause__, OSError) else "damaged"
    try:
        check_program(state, path)
    except tg.CheckpointError:
        return *nothing, "of another program"
    losses = (state["metrics"]["smooth_loss"], state["best_loss"])
    shown = (f"{loss:.4f}" if math.isfinite(loss) else "-" for loss in losses)
    return state["step"], state["epoch"], *shown, state["run_id"], state["exit_reason"]


def check_program(state: dict, path: Path) -> None:
    """Raises CheckpointError unless a checkpoint's values are of the types that a run of this program saves."""
    tg.check_origin(state, path)
    kinds = {
        "step": int, "epoch": int, "batch_in_epoch": int, "best_loss": float, "exit_reason": str, "metrics": dict,
        "run_id": str, "saved_at": str, "torch_version": str, "optimizer_state_dicts": dict,
    }  # fmt: skip
    wrong = [key for key, kind in kinds.items() if not isinstance(state.get(key), kind)]
    if not wrong:
        smooth, seconds = (state["metrics"].get(key) for key in ("smooth_loss", "seconds"))
        if not isinstance(smooth, float) or not isinstance(seconds, float) or not 0 <= seconds < 1e12:
            wrong.append("metrics")
        if not all(isinstance(weight, torch.Tensor) for weight in state["model_state_dict"].values()):
            wrong.append("model_state_dict")
    if wrong:
        raise tg.CheckpointError(f"{path}: not a checkpoint of this program ({', '.join(wrong)})")


def show_checkpoint(path: Path) -> None:
    """Prints what a checkpoint holds, and the command line that makes its configuration."""
    state = tg.load_checkpoint(path)
    check_program(state, path)
    config, weights, metrics = state["config"], state["model_state_dict"], state["metrics"]
    best = f"{state['best_loss']:.4f} at best" if state["best_loss"] < math.inf else "not known yet"
    rows = {
        "Checkpoint": path,
        "Saved": f"{state['saved_at']} ({state['exit_reason']})",
        "Run": f"{state['run_id']}, PyTorch {state['torch_version']}",
        "Step": f"{state['step']} (epoch {state['epoch']}, batch {state['batch_in_epoch']})",
        "Trained for": datetime.timedelta(seconds=round(metrics["seconds"])),
        "Loss": f"{metrics['smooth_loss']:.4f} nats a byte, on the validation data {best}",
        "Parameters": f"{sum(weight.numel() for weight in weights.values()):,} in {len(weights)} tensors",
        "Optimizers": ", ".join(map(str, state["optimizer_state_dicts"])),
        "Metrics": metrics.get("file"),
    }
    for name, value in rows.items():
        print(f"{name + ':':<13}{printable(str(value))}")
    print("Configuration:")
    for field in dataclasses.fields(tg.Config):
        value = config[field.name]
        shown = "none" if value is None else str(value)
        if isinstance(value, tuple):
            shown = " ".join(value) or "Python's standard library"
        default = "" if value != field.default else "  (default)"
        print(f"   {'--' + field.name.replace('_', '-'):<18}{printable(shown)}{default}")


def sample(path: Path, prompt: str, device: torch.device, length: int = SAMPLE_BYTES, temperature: float = 0.8) -> None:
    """Prints prompt and what the model of a checkpoint writes after it, byte by byte, always the same."""
    state = tg.load_checkpoint(path)
    tg.check_origin(state, path)
    config = tg.Config.from_options({}, state["config"])
    tg.check_model(config, state["model_state_dict"], path)
    model = tg.ByteLM(config).to(device).eval()
    model.load_state_dict(state["model_state_dict"])
    generator = torch.Generator().manual_seed(config.seed)
    written = list(os.fsencode(prompt)) or [ord("\n")]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    print(printable(decoder.decode(bytes(written))), end="", flush=True)
    with torch.inference_mode():
        for _ in range(length):
            logits, _ = model(torch.tensor([written[-config.context :]], device=device))
            odds = (logits[0, -1] / temperature).softmax(dim=-1).cpu()
            written.append(int(torch.multinomial(odds, 1, generator=generator)))
            print(printable(decoder.decode(bytes(written[-1:]))), end="", flush=True)
    print(printable(decoder.decode(b"", final=True)))


def printable(text: str) -> str:
    """Without what a stranger's checkpoint, or a model, might do to a terminal."""
    return re.sub(r"[^\n\t]", lambda match: match[0] if match[0].isprintable() else "?", text)


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise tg.UserError(f"{message} (--help shows the usage)")


def look(arguments: list[str] | None) -> None:
    """Does what the command line says. Raises UserError."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("list", "show", "sample"))
    parser.add_argument("checkpoint", nargs="?", metavar="DIR_OR_CKPT")
    parser.add_argument("--checkpoint-dir", default="checkpoints", metavar="DIR", help="where `latest` is looked for")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what a sample goes on from (default a new line)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to sample")
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that shows no symbols is no reason to fail.
        sys.stdout.reconfigure(errors="replace")
    if options.what == "list":
        list_checkpoints(options.checkpoint or options.checkpoint_dir)
    else:
        path = tg.named_checkpoint(options.checkpoint or "latest", options.checkpoint_dir)
        if options.what == "show":
            show_checkpoint(path)
        else:
            sample(path, options.prompt, tg.choose_device(options.device))
    print(end="", flush=True)


def main(arguments: list[str] | None = None) -> int:
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, frame: sys.exit(128 + signum))
    try:
        look(arguments)
        return 0
    except tg.UserError as error:
        message = " ".join(str(error).splitlines())
    except BrokenPipeError:
        # As in list | head.
        return 128 + signal.SIGPIPE
    except OSError as error:
        message = f"{error.filename or 'standard output'}: {error.strerror}"
    with contextlib.suppress(OSError):
        print("error:", message, file=sys.stderr)
    return 2


if __name__ == "__main__":
    exit_code = main()
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    # What standard output did not take must not be tried, and complained of, once more.
    os._exit(exit_code)
