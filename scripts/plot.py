#!/usr/bin/env python3
"""Draws the losses of runs over their steps as an SVG that is readable on light and dark ground.

    scripts/plot.py                          all runs of checkpoints/, drawn in checkpoints/metrics.svg
    scripts/plot.py DIR_OR_CSV ... -o X.svg  the runs of other directories, or single ones

A line is the training loss, dots are the validation loss; a mark on the axis is a stop, after which the run went on.
"""

import argparse
import csv
import html
import itertools
import math
import re
import sys
import zipfile
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 460, 60, 20, 20, 50
POINTS = 1000  # of a line: more than can be seen
COLORS = [("#0b62a4", "#6cb6ff"), ("#b3390a", "#ff9d6c"), ("#1a7f37", "#7ee787"), ("#7a3db8", "#d2a8ff"), ("#8a6d00", "#e3c34a"), ("#b0246d", "#ff8ac0")]


class Run:
    """steps and losses of a metrics.csv, and the steps at which it was stopped. Raises ValueError where it is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("not a file")
        self.loss: list[tuple[int, float]] = []
        self.validation: list[tuple[int, float]] = []
        with open(self.path, newline="") as file:
            rows = csv.DictReader(file)
            if not {"step", "loss", "val_loss"} <= set(rows.fieldnames or ()):
                raise ValueError("no metrics.csv of this program")
            for row in rows:
                if None in row.values():  # cut short, as the program does with it when it goes on
                    break
                if not (self.loss[-1][0] if self.loss else 0) < int(row["step"]) < 10**15:
                    raise ValueError(f"its steps do not rise in line {rows.line_num}")
                self.loss.append((int(row["step"]), float(row["loss"])))
                if row["val_loss"]:
                    self.validation.append((int(row["step"]), float(row["val_loss"])))
        if not any(math.isfinite(loss) for _, loss in self.loss):
            raise ValueError("no loss yet that could be drawn" if self.loss else "no rows yet")
        found = (re.match(r"emergency_step_(\d+)", saved.name) for saved in (self.path.parent / "emergency_exit").glob("emergency_step_*")
                 if belongs_to(saved, self.path.name))
        self.stops = sorted({int(name[1]) for name in found if name and 0 < int(name[1]) < self.loss[-1][0]})


def metrics_files(path: Path) -> list[Path]:
    """Of a directory, those of every run that has rows, the oldest first; else the path itself."""
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("metrics*.csv"), key=lambda file: (len(file.name), file.name))
    return [file for file in files if not file.is_file() or has_rows(file)] or files or [path / "metrics.csv"]


def has_rows(file: Path) -> bool:
    """Whether a line follows the header; the others are read once, by Run."""
    with open(file, "rb") as lines:
        return lines.read(1000).count(b"\n") > 1


def belongs_to(checkpoint: Path, metrics: str) -> bool:
    """True where a checkpoint names that metrics file as its own: several runs may have been stopped in one directory."""
    text = b"X" + len(metrics.encode()).to_bytes(4, "little") + metrics.encode()  # as pickle writes it
    try:
        with zipfile.ZipFile(checkpoint / "state.pt" if checkpoint.is_dir() else checkpoint) as archive:
            return any(text in archive.read(record) for record in archive.namelist() if record.endswith("/data.pkl"))
    except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile):  # damaged, or none: no mark is better than a wrong one
        return False


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between low and high, about count of them."""
    step = 10 ** math.floor(math.log10(max(high - low, 1e-9) / count))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]


def thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most POINTS of them, each the mean of its neighbours, so that no part of a long run is left out."""
    if len(points) <= POINTS:
        return points
    groups = (points[i * len(points) // POINTS : (i + 1) * len(points) // POINTS] for i in range(POINTS))
    return [(group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups]


def svg(runs: list[Run]) -> str:
    """The picture as text."""
    drawn = [value for run in runs for _, value in (*thinned(run.loss), *run.validation) if math.isfinite(value)]
    last, low, high = max(run.loss[-1][0] for run in runs), min(drawn), max(drawn)
    low, high = low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)

    def x(step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * step / last, 1)

    def y(loss: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low), 1)

    floor = HEIGHT - BOTTOM
    light = "".join(f".s{i}{{stroke:{a};fill:{a}}}" for i, (a, _) in enumerate(COLORS))
    dark = "".join(f".s{i}{{stroke:{b};fill:{b}}}" for i, (_, b) in enumerate(COLORS))
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="losses over steps">',
             "<style>text{font:12px system-ui,sans-serif;fill:#24292f}rect{fill:#fff}.grid{stroke:#d0d7de}.mark{stroke:#57606a;stroke-dasharray:3 3}"
             f"polyline{{fill:none!important;stroke-width:1.5}}text.legend{{stroke:none}}{light}"
             "@media (prefers-color-scheme: dark){text{fill:#e6edf3}rect{fill:#0d1117}.grid{stroke:#30363d}.mark{stroke:#8b949e}" + dark + "}</style>",
             f'<rect width="{WIDTH}" height="{HEIGHT}"/>']
    for value in ticks(low, high, 6):
        parts += [f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value)}" y2="{y(value)}"/>',
                  f'<text x="{LEFT - 8}" y="{y(value) + 4}" text-anchor="end">{value:g}</text>']
    for value in ticks(0, last, 8):
        parts.append(f'<text x="{x(value)}" y="{floor + 18}" text-anchor="middle">{value:,.0f}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">step; loss in nats a byte</text>')
    for number, run in enumerate(runs):
        style = f"s{number % len(COLORS)}"
        for stop in run.stops:
            parts.append(f'<line class="mark {style}" x1="{x(stop)}" x2="{x(stop)}" y1="{floor - 12}" y2="{floor}"><title>stopped at step {stop}</title></line>')
        points = " ".join(f"{x(step)},{y(loss)}" for step, loss in thinned(run.loss) if math.isfinite(loss))
        parts.append(f'<polyline class="{style}" points="{points}"/>')
        parts += [f'<circle class="{style}" cx="{x(step)}" cy="{y(loss)}" r="3"><title>step {step}: {loss:.4f}</title></circle>'
                  for step, loss in run.validation if math.isfinite(loss)]
        parts.append(f'<text class="legend {style}" x="{WIDTH - RIGHT - 8}" y="{TOP + 16 * (number + 1)}" text-anchor="end">{html.escape(str(run.path))}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, default=[Path("checkpoints")], metavar="DIR_OR_CSV", help="checkpoint directories, or metrics.csv files of single runs")
    parser.add_argument("-o", "--output", type=Path, help="the picture (default metrics.svg beside the first metrics.csv)")
    arguments = parser.parse_args()
    runs, path = [], None
    try:
        for path in itertools.chain(*map(metrics_files, arguments.runs)):
            runs.append(Run(path))
        first = arguments.runs[0]
        path = arguments.output or (first / "metrics.svg" if first.is_dir() else first.with_suffix(".svg"))
        if path.suffix != ".svg":
            raise ValueError("the picture's name must end in .svg")
        path.write_text(svg(runs), encoding="utf-8")
    except (OSError, ValueError, csv.Error) as error:
        print(f"error: {getattr(error, 'filename', None) or path}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 2
    print(f"Drawn: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
