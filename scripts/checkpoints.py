#!/usr/bin/env python3
"""Looks at checkpoints, and changes nothing.

    scripts/checkpoints.py list [DIR]       those of a directory (default checkpoints), by run
    scripts/checkpoints.py show [CKPT]      what one holds, whatever script has saved it
    scripts/checkpoints.py sample [CKPT]    400 bytes that the built-in model of one writes

CKPT is a path, or `latest` (the default): the one of --checkpoint-dir that `list` marks with an
arrow, from which --resume latest goes on.
"""

import argparse
import codecs
import contextlib
import datetime
import io
import os
import re
import shlex
import signal
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_graceful as tg

SAMPLE_BYTES = 400
# What a checkpoint of this program has, and what is in its parts.
ENTRIES = dict.fromkeys(("format_version", "step"), int)
ENTRIES |= dict.fromkeys(("exit_reason", "torch_version", "run_id", "saved_at"), str)
ENTRIES |= dict.fromkeys(("optimizer_state_dicts", "scheduler_state_dicts", "state_dicts"), dict)
ENTRIES |= dict.fromkeys(("model_state_dict", "best", "evaluation", "metrics", "config"), dict)
ENTRIES |= {"loop": dict}
INSIDE = {
    "best": {"value", "step", "of"},
    "evaluation": {"values", "step"},
    "metrics": {"sessions", "seconds", "smooth_loss"},
}


def list_checkpoints(directory: str) -> None:
    """Prints a line for every checkpoint of a directory, and marks what `latest` would take.

    The run that has saved last comes first, and its furthest step; what belongs to no run comes
    last, and what is called like a checkpoint but cannot be one (a dangling link, a pipe). Raises
    UserError where there is nothing.
    """
    if os.path.isfile(directory):
        command = f"show {shlex.quote(directory)}"
        raise tg.UserError(f"{directory} is a file; {command} prints what it holds")
    folder = Path(os.path.abspath(directory))
    preferred = tg.find_checkpoints(folder, lambda skipped: None)
    runs = list(dict.fromkeys(str(state["run_id"]) for _, state in preferred))

    def place(one: tuple) -> tuple:
        path, state = one
        return runs.index(str(state["run_id"])), -int(state["step"]), path

    named = sorted({*folder.glob("[!.]*.pt"), *folder.glob("emergency_exit/[!.]*.pt")})
    if not named:
        reason = "no checkpoints" if folder.is_dir() else "No such file or directory"
        raise tg.UserError(f"{directory}: {reason}")
    rows = {path: row_of(path) for path in named if path.is_file()}
    whole = [path for path, _ in preferred if rows.get(path, {}).get("whole")]
    show_row("step", "loss", "best", "age", "size", "run", "reason", "checkpoint")
    for path, state in sorted(preferred, key=place):
        row = rows.pop(path, None) or row_of(path)
        mark = " <- latest" if path in whole[:1] else ""
        figures = row["loss"], row["best"], age_of(state["saved_at"]), row["size"]
        known = *figures, str(state["run_id"])[:6], row["reason"]
        show_row(int(state["step"]), *known, os.path.relpath(path) + mark)
        named.remove(path)
    for path, row in rows.items():
        show_row("", "", "", "", row["size"], "", row["reason"], os.path.relpath(path))
        named.remove(path)
    for path in named:
        show_row("", "", "", "", "", "", "no checkpoint", os.path.relpath(path))


def show_row(*columns: object) -> None:
    line = "{:>7}  {:>8}  {:>8}  {:>8}  {:>7}  {:<6}  {:<28}  {}".format(*columns)
    print(printable(line), flush=True)


def row_of(path: Path) -> dict[str, typing.Any]:
    """What `list` shows of a checkpoint beside step and run; `whole` is what `latest` takes."""
    row = {"loss": "-", "best": "-", "size": "", "whole": False}
    try:
        row["size"] = short_size(path.stat().st_size)
        state = tg.load_checkpoint(path)
    except (OSError, tg.CheckpointError) as error:
        cause = error.__cause__ or error
        reason = "damaged"
        if isinstance(cause, OSError):
            # The run may have deleted it just now.
            reason = "gone" if isinstance(cause, FileNotFoundError) else "unreadable"
        return {**row, "reason": reason}
    if not is_ours(state):
        return {**row, "reason": "of another program", "whole": True}
    losses = {"loss": state["metrics"]["smooth_loss"], "best": state["best"]["value"]}
    row |= {name: f"{value:.4f}" for name, value in losses.items() if value is not None}
    return {**row, "reason": state["exit_reason"], "whole": True}


def short_size(size: float) -> str:
    """Of bytes, in decimal units, as ls and disks count."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} GB" if size < 1000 else f"{size:,.0f} GB"


def age_of(saved_at: str) -> str:
    try:
        saved = datetime.datetime.fromisoformat(saved_at)
        age = datetime.datetime.now(datetime.timezone.utc) - saved
    except (ValueError, TypeError):
        return "-"
    return short_time(max(0.0, age.total_seconds()))


def short_time(seconds: float) -> str:
    """In words, with one unit: 90 s is 1.5 min."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def is_ours(state: dict) -> bool:
    typed = all(isinstance(state.get(name), kind) for name, kind in ENTRIES.items())
    known = typed and state["format_version"] == tg.Run.FORMAT_VERSION
    return known and all(state[name].keys() >= keys for name, keys in INSIDE.items())


def show_checkpoint(path: Path) -> None:
    """Prints what a checkpoint holds; of one that another program has saved, what stands where."""
    state = tg.load_checkpoint(path)
    show("Checkpoint", path)
    if not is_ours(state):
        show("Saved", "by another program")
        for key, value in state.items():
            show(key, described(value))
        return
    metrics, best, evaluation = state["metrics"], state["best"], state["evaluation"]
    show("Saved", f"{state['saved_at']} ({state['exit_reason']})")
    session = f"session {metrics['sessions']}"
    show("Run", f"{state['run_id']}, {session}, PyTorch {state['torch_version']}")
    show("Step", f"{state['step']:,}, after {short_time(metrics['seconds'])} of training")
    if metrics["smooth_loss"] is not None:
        show("Loss", f"{metrics['smooth_loss']:.4f} (of the last batches)")
    if best["value"] is not None:
        show("Best", f"{best['of']} {best['value']:.4f} at step {best['step']:,}")
    for name, value in evaluation["values"].items():
        show("Evaluation", f"{name} {value:.4f} at step {evaluation['step']:,}")
    for name, value in models_of(state):
        show("Model", f"{name}: {described(value)}")
    for name, value in state["optimizer_state_dicts"].items():
        show("Optimizer", f"{name}: {optimizer_in_words(value)}")
    for name, value in state["scheduler_state_dicts"].items():
        steps = value.get("last_epoch") if isinstance(value, dict) else None
        show(
            "Scheduler",
            f"{name}: {described(value) if steps is None else f'at step {described(steps)}'}",
        )
    for name, value in state["state_dicts"].items():
        if not is_module(value):
            show("State", f"{name}: {described(value)}")
    for name, value in state["loop"].items():
        if (words := described(value)) != "empty":
            show("Loop", f"{name}: {words}")
    show_configuration(state["config"])


def show(label: str, value: object) -> None:
    print(f"{printable(str(label)) + ':':<13}{printable(str(value))}")


def is_module(value: object) -> bool:
    """A module's state_dict has an attribute that no other has."""
    return isinstance(value, dict) and hasattr(value, "_metadata")


def models_of(state: dict) -> Iterator[tuple[str, dict]]:
    if state["model_state_dict"]:
        yield "model", state["model_state_dict"]
    yield from ((name, one) for name, one in state["state_dicts"].items() if is_module(one))


def described(value: object) -> str:
    """How much is in a part of a checkpoint: tensors that share memory count once."""
    if not isinstance(value, (dict, list, tuple, torch.Tensor)):
        return str(value)[:200]
    tensors: dict[object, int] = {}
    others = 0
    for leaf in leaves(value):
        if isinstance(leaf, torch.Tensor):
            start = leaf.untyped_storage().data_ptr() if leaf.numel() else id(leaf)
            tensors[start, leaf.storage_offset(), leaf.shape, leaf.stride()] = leaf.numel()
        elif leaf is not None:
            others += 1
    words = []
    if tensors:
        words.append(
            f"{counted(sum(tensors.values()), 'number')} in {counted(len(tensors), 'tensor')}"
        )
    if others and not is_module(value):
        words.append(counted(others, "other value"))
    return " and ".join(words) or "empty"


def leaves(value: object) -> Iterator[object]:
    """What is no dict, list or tuple in value. A stranger's may hold one list again and again."""
    left, seen = [value], set()
    while left:
        one = left.pop()
        if not isinstance(one, (dict, list, tuple)):
            yield one
        elif id(one) not in seen:
            seen.add(id(one))
            left += one.values() if isinstance(one, dict) else one


def counted(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


def optimizer_in_words(state: object) -> str:
    try:
        groups = state["param_groups"]
        count = sum(len(group["params"]) for group in groups)
        rates = ", ".join(sorted({f"{float(group['lr']):.3g}" for group in groups}))
        kind = state["class"].rpartition(".")[2]
        words = f"{kind}, {counted(count, 'tensor')}, learning rate {rates}"
        if any("train_mode" in group for group in groups):
            # Schedule-free: its eval() changes the model's weights.
            words += "; the model's weights are those that it trains, not those that it evaluates"
        return words
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):
        return described(state)


def show_configuration(config: dict) -> None:
    """As options; those of the built-in program with a word where they are the defaults."""
    defaults = {}
    if is_built_in(config):
        defaults = {name: one.default for name, one in tg.declared(tg.OPTIONS).items()}
        defaults["checkpoint_dir"] = os.path.abspath(defaults["checkpoint_dir"])
    print("Configuration:")
    for name, value in config.items():
        several = value if isinstance(value, tuple) else (value,)
        shown = " ".join(map(described, several)) if value is not None and several else "none"
        same = name in defaults and value == defaults[name]
        print(f"   {printable(tg.flag(str(name))):<18}{printable(shown)}{'  (default)' * same}")


def is_built_in(config: object) -> bool:
    stored = tg.declared(tg.OPTIONS).keys() - tg.NOT_STORED
    return isinstance(config, dict) and config.keys() == stored


def built_in_model(path: Path) -> tuple[tg.ByteLM, argparse.Namespace]:
    """The model of a checkpoint, and its configuration. Raises UserError where it is another."""
    state = tg.load_checkpoint(path)
    other = tg.UserError(f"{path}: sample works for the built-in model alone, and this is another")
    if not is_ours(state) or not is_built_in(state["config"]):
        raise other
    config, weights = argparse.Namespace(**state["config"]), state["model_state_dict"]
    sizes = (config.context, config.layers, config.heads, config.dim, config.experts)
    if not all(type(size) is int and 0 <= size < 2**63 for size in (*sizes, config.seed)):
        raise other
    if 0 in sizes or config.dim % config.heads or config.layers * config.experts > len(weights):
        raise other
    try:
        # Without memory: a stranger's configuration may say anything.
        with torch.device("meta"):
            model = tg.ByteLM(*sizes, 0.0, rotations=config.mode == "geometric")
        model.load_state_dict(weights, assign=True)
    except (RuntimeError, TypeError, AttributeError):
        raise other from None
    return model.eval(), config


def sample(
    path: Path,
    prompt: str,
    device: torch.device,
    length: int = SAMPLE_BYTES,
    temperature: float = 0.8,
) -> None:
    """Prints prompt and what the model of a checkpoint writes after it, always the same."""
    model, config = built_in_model(path)
    model.to(device)
    generator = torch.Generator().manual_seed(config.seed)
    written = list(os.fsencode(prompt)) or [ord("\n")]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    print(printable(decoder.decode(bytes(written))), end="", flush=True)
    with torch.inference_mode():
        for _ in range(length):
            logits = model(torch.tensor([written[-config.context :]], device=device))
            odds = (logits[0, -1].float() / temperature).softmax(dim=-1).cpu()
            written.append(int(torch.multinomial(odds, 1, generator=generator)))
            print(printable(decoder.decode(bytes(written[-1:]))), end="", flush=True)
    print(printable(decoder.decode(b"", final=True)))


def named(name: str, directory: str) -> Path:
    """The path that CKPT means. Raises UserError."""
    if name == "latest":
        # What is damaged is named where it does not get between the lines of a pipe.
        report = lambda text: print(printable(text), file=sys.stderr)  # noqa: E731
        return tg.latest_checkpoint(directory, report)
    if os.path.isdir(name) and (found := tg.find_checkpoints(name, lambda skipped: None)):
        newest = os.path.relpath(found[0][0])
        raise tg.UserError(f"{name} is a directory of checkpoints; its latest is {newest}")
    if not os.path.exists(name):
        hint = "scripts/checkpoints.py list shows what there is"
        raise tg.UserError(f"{name}: No such file or directory; {hint}")
    return Path(name)


def printable(text: str) -> str:
    """Without what a stranger's checkpoint, or a model, might do to a terminal."""
    return re.sub(r"[^\n\t]", lambda match: match[0] if match[0].isprintable() else "?", text)


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise tg.UserError(f"{message} (--help shows the usage)")


def look(arguments: list[str] | None) -> None:
    """Does what the command line says. Raises UserError."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("list", "show", "sample"))
    parser.add_argument("checkpoint", nargs="?", metavar="DIR_OR_CKPT")
    parser.add_argument(
        "--checkpoint-dir",
        default="checkpoints",
        metavar="DIR",
        help="where `latest` is looked for",
    )
    parser.add_argument(
        "--prompt",
        default="",
        metavar="TEXT",
        help="what a sample goes on from (default a new line)",
    )
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to sample"
    )
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that shows no symbols is no reason to fail.
        sys.stdout.reconfigure(errors="replace")
    if options.what == "list":
        list_checkpoints(options.checkpoint or options.checkpoint_dir)
    else:
        path = named(options.checkpoint or "latest", options.checkpoint_dir)
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
