"""The benchmarks measure what they say; whether the figures are good is not asked here."""

import subprocess
import sys

import helpers as h

sys.path.insert(0, str(h.ROOT / "scripts"))
import bench


def test_a_short_benchmark_prints_a_row_for_every_figure(tmp_path, whole):
    sections = list(bench.SECTIONS) if whole else ["hearing", "saving"]
    script = h.ROOT / "scripts" / "bench.py"
    command = [sys.executable, script, "--quick", "--dir", tmp_path, "--only", *sections]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "", result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("|")]
    # Behind the two lines of the table's head.
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert len(rows) == (13 if whole else 6)
    for name, ours, reference, ratio, wanted, _ in rows:
        assert float(ours.split()[0].replace(",", "")) > 0, name
        assert bool(reference) == bool(ratio) == (" / " in name)
        assert wanted.startswith("≤") or "to the last line" in name or "to the prompt" in name
    # Nothing that was written for measuring is left.
    assert list(tmp_path.iterdir()) == []


def test_the_verdict_is_on_the_median_of_the_rounds_ratios():
    figure = bench.Figure("a figure", "s", [2.0, 3.0, 9.0], 1.5, [2.0, 2.0, 1.0])
    assert figure.value == 1.5
    assert figure.row() == "| a figure | 3 (2-9) s | 2 (1-2) s | 1.500 (1.00-9.00) | ≤ 1.5 | yes |"
    assert not bench.Figure("a figure", "s", [2.0, 3.1, 9.0], 1.5, [2.0, 2.0, 1.0]).good
    slow = bench.Figure("a figure", "ms", [21.0], 20)
    assert slow.row() == "| a figure | 21 ms |  |  | ≤ 20 ms | **no** |"
    alone = bench.Figure("a figure", "ms", [21.0], None)
    assert alone.row() == "| a figure | 21 ms |  |  |  |  |"
