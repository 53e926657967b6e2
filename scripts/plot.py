#!/usr/bin/env python3
"""Draws what runs have logged, as an SVG that is readable on light and dark ground.

    scripts/plot.py                          all runs of checkpoints/, in checkpoints/metrics.svg
    scripts/plot.py DIR_OR_CSV ... -o X.svg  the runs of other directories, or of single files

There is a chart for each name: its values in training are a line, those of evaluations (val_NAME in
metrics.csv) are dots. A mark on the axis is a stop, after which the run went on.
"""

import argparse
import csv
import html
import itertools
import math
import re
import sys
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 460, 60, 20, 40, 50
# Of a line: more than can be seen.
POINTS = 1000
COLORS = [
    ("#0b62a4", "#6cb6ff"),
    ("#b3390a", "#ff9d6c"),
    ("#1a7f37", "#7ee787"),
    ("#7a3db8", "#d2a8ff"),
    ("#8a6d00", "#e3c34a"),
    ("#b0246d", "#ff8ac0"),
]
# Columns of metrics.csv that are no values of the model.
OTHERS = {"step", "epoch", "samples_per_second", "seconds", "run"}
# Of a checkpoint: they hold the first keys, run_id among them.
HEAD_BYTES = 4096

Points = list[tuple[int, float]]


class Run:
    """What one run has logged, and the steps at which it was stopped."""

    def __init__(self, path: Path, run_id: str) -> None:
        self.path, self.run_id = path, run_id
        self.label = str(path)
        self.step = 0
        self.training: dict[str, Points] = {}
        self.validation: dict[str, Points] = {}
        self.samples_per_second: list[float] = []
        self.stops: list[int] = []

    def add(self, row: dict[str, str], line: int) -> None:
        """Raises ValueError for a row that this program cannot have written."""
        if not self.step < int(row["step"]) < 10**15:
            raise ValueError(f"its steps do not rise in line {line}")
        self.step = int(row["step"])
        for column, text in row.items():
            if not text or column in OTHERS or column.startswith("lr_"):
                continue
            name = column.removeprefix("val_")
            values = self.training if name == column else self.validation
            values.setdefault(name, []).append((self.step, float(text)))
        if row.get("samples_per_second"):
            self.samples_per_second.append(float(row["samples_per_second"]))

    def points(self, name: str) -> Points:
        both = [*thinned(self.training.get(name, [])), *self.validation.get(name, [])]
        return [point for point in both if math.isfinite(point[1])]

    def names(self) -> list[str]:
        """Of all values that can be drawn."""
        return [name for name in {**self.training, **self.validation} if self.points(name)]

    def find_stops(self) -> None:
        """From the names of its emergency checkpoints; other runs may have been stopped there."""
        for saved in (self.path.parent / "emergency_exit").glob("emergency_step_*.pt"):
            name = re.match(r"emergency_step_(\d+)", saved.name)
            if name and 0 < int(name[1]) < self.step and belongs_to(saved, self.run_id):
                self.stops.append(int(name[1]))
        self.stops = sorted(set(self.stops))


def runs_in(path: Path) -> list[Run]:
    """The runs whose rows are in a metrics.csv. Raises ValueError where it is none."""
    # A pipe would be waited for.
    if path.exists() and not path.is_file():
        raise ValueError("not a file")
    runs: dict[str, Run] = {}
    with open(path, newline="") as file:
        rows = csv.DictReader(file)
        if not {"step", "run"} <= set(rows.fieldnames or ()):
            raise ValueError("no metrics.csv of this program")
        for row in rows:
            # One that was cut short is none.
            if None not in row.values():
                run = runs.setdefault(row["run"], Run(path, row["run"]))
                run.add(row, rows.line_num)
    found = [run for run in runs.values() if run.names()]
    if not found:
        raise ValueError("nothing in it yet that could be drawn" if runs else "no rows yet")
    for run in found:
        run.find_stops()
        if len(found) > 1:
            run.label = f"{path} ({run.run_id[:6]})"
    return found


def metrics_files(path: Path) -> list[Path]:
    """Of a directory, those of every run that has rows, the oldest first; else the path itself."""
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("metrics*.csv"), key=lambda file: (len(file.name), file.name))
    with_rows = [file for file in files if not file.is_file() or has_rows(file)]
    return with_rows or files or [path / "metrics.csv"]


def has_rows(file: Path) -> bool:
    """Whether a line follows the header; the others are read once, by runs_in."""
    with open(file, "rb") as lines:
        return lines.readline(10**6).endswith(b"\n") and bool(lines.read(1))


def belongs_to(checkpoint: Path, run_id: str) -> bool:
    """True where a checkpoint is of that run, as far as its first bytes say."""
    try:
        if not run_id or not checkpoint.is_file():
            return False
        with open(checkpoint, "rb") as file:
            return run_id.encode() in file.read(HEAD_BYTES)
    except OSError:
        # No mark is better than a wrong one.
        return False


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between low and high, about count of them."""
    step = 10 ** math.floor(math.log10(max(high - low, 1e-9) / count))
    step = next(step * f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= count)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]


def thinned(points: Points) -> Points:
    """At most POINTS, each the mean of its neighbours: no part of a long run is left out."""
    if len(points) <= POINTS:
        return points
    cuts = [i * len(points) // POINTS for i in range(POINTS + 1)]
    groups = [points[first:last] for first, last in itertools.pairwise(cuts)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def svg(runs: list[Run]) -> str:
    """The picture as text: a chart below the other for each name, the loss first."""
    names = list(dict.fromkeys(name for run in runs for name in run.names()))
    names.sort(key=lambda name: name != "loss")
    size = f"0 0 {WIDTH} {HEIGHT * len(names)}"
    light, dark = (
        "".join(f".s{i}{{stroke:{pair[n]};fill:{pair[n]}}}" for i, pair in enumerate(COLORS))
        for n in (0, 1)
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" role="img"'
        f' aria-label="{html.escape(", ".join(names))} over steps">',
        "<style>text{font:12px system-ui,sans-serif;fill:#24292f}rect{fill:#fff}"
        ".grid{stroke:#d0d7de}.mark{stroke:#57606a;stroke-dasharray:3 3}text.legend{stroke:none}"
        f"polyline{{fill:none!important;stroke-width:1.5}}{light}"
        "@media (prefers-color-scheme: dark){text{fill:#e6edf3}rect{fill:#0d1117}"
        f".grid{{stroke:#30363d}}.mark{{stroke:#8b949e}}{dark}}}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT * len(names)}"/>',
    ]
    for number, name in enumerate(names):
        parts.append(f'<g transform="translate(0 {HEIGHT * number})">')
        parts += chart(runs, name)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def chart(runs: list[Run], name: str) -> list[str]:
    """The runs' values of one name, all to one scale."""
    drawn = [value for run in runs for _, value in run.points(name)]
    last, low, high = max(run.step for run in runs), min(drawn), max(drawn)
    low, high = low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)
    floor, middle = HEIGHT - BOTTOM, (LEFT + WIDTH - RIGHT) / 2

    def x(step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * step / last, 1)

    def y(value: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low), 1)

    def words(text: str, x: float, y: float, anchor: str, kind: str = "") -> str:
        attributes = f'{kind}x="{x}" y="{y}" text-anchor="{anchor}"'
        return f"<text {attributes}>{html.escape(text)}</text>"

    parts = [words(name, LEFT, TOP - 16, "start", 'class="name" ')]
    for value in ticks(low, high, 6):
        ends = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value)}" y2="{y(value)}"'
        parts += [
            f'<line class="grid" {ends}/>',
            words(f"{value:g}", LEFT - 8, y(value) + 4, "end"),
        ]
    for value in ticks(0, last, 8):
        parts.append(words(f"{value:,.0f}", x(value), floor + 18, "middle"))
    axis = "step (line: training, dots: validation)"
    parts.append(words(axis, middle, HEIGHT - 8, "middle"))
    shown = [run for run in runs if run.points(name)]
    for row, run in enumerate(shown):
        style = f"s{runs.index(run) % len(COLORS)}"
        for stop in run.stops:
            ends = f'x1="{x(stop)}" x2="{x(stop)}" y1="{floor - 12}" y2="{floor}"'
            title = f"<title>stopped at step {stop}</title>"
            parts.append(f'<line class="mark {style}" {ends}>{title}</line>')
        line = thinned(run.training.get(name, []))
        places = " ".join(f"{x(step)},{y(value)}" for step, value in line if math.isfinite(value))
        if places:
            parts.append(f'<polyline class="{style}" points="{places}"/>')
        for step, value in run.validation.get(name, []):
            if math.isfinite(value):
                title = html.escape(f"step {step}: val_{name} {value:.4f}")
                place = f'cx="{x(step)}" cy="{y(value)}" r="3"'
                parts.append(f'<circle class="{style}" {place}><title>{title}</title></circle>')
        kind, height = f'class="legend {style}" ', TOP + 16 * (row + 1)
        parts.append(words(run.label + speed(run), WIDTH - RIGHT - 8, height, "end", kind))
    return parts


def speed(run: Run) -> str:
    """The median of its rows, for the legend."""
    rates = sorted(rate for rate in run.samples_per_second if math.isfinite(rate))
    return f", {rates[len(rates) // 2]:,.0f} samples/s" if rates else ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        default=[Path("checkpoints")],
        metavar="DIR_OR_CSV",
        help="checkpoint directories, or single metrics.csv files",
    )
    default = "default metrics.svg beside the first metrics.csv"
    parser.add_argument("-o", "--output", type=Path, help=f"the picture ({default})")
    arguments = parser.parse_args()
    runs, path = [], None
    try:
        for path in itertools.chain(*map(metrics_files, arguments.runs)):
            runs += runs_in(path)
        first = arguments.runs[0]
        beside = first / "metrics.svg" if first.is_dir() else first.with_suffix(".svg")
        path = arguments.output or beside
        if path.suffix != ".svg":
            raise ValueError("the picture's name must end in .svg")
        path.write_text(svg(runs), encoding="utf-8")
    except (OSError, ValueError, csv.Error) as error:
        where = getattr(error, "filename", None) or path
        print(f"error: {where}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 2
    print(f"Drawn: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
