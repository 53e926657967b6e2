"""The benchmark measures what it says it does; whether the figures are good is not asked here."""

import json
import math
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import bench


def quick(script, *arguments) -> str:
    command = [sys.executable, str(ROOT / "scripts" / script), "--quick", *map(str, arguments)]
    pipe = subprocess.PIPE
    result = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)
    assert result.returncode == 0 and result.stderr == "", result.stdout + result.stderr
    return result.stdout


def test_a_short_benchmark_prints_a_row_for_every_figure_and_appends_them_as_json(tmp_path, whole):
    sections = list(bench.SECTIONS) if whole else ["hearing"]
    json_file = tmp_path / "bench.jsonl"
    output = quick("bench.py", "--dir", tmp_path, "--json", json_file, "--only", *sections)
    [line] = json_file.read_text().splitlines()
    measured = json.loads(line)
    assert measured["cores"] and measured["torch"] and measured["quick"] is True
    assert {figure["section"] for figure in measured["figures"]} == set(sections)
    for figure in measured["figures"]:
        values = figure["ours"] + (figure["reference"] or [])
        assert figure["ours"] and all(map(math.isfinite, values)), figure
        assert f"| {figure['name']} | " in output
    # Nothing that was written for measuring is left.
    assert [path.name for path in tmp_path.iterdir()] == ["bench.jsonl"]


@pytest.mark.campaign
def test_a_short_scaling_benchmark_prints_what_it_measured_and_what_follows_from_it(tmp_path):
    lines = quick("bench_scaling.py", "--dir", tmp_path).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    rows = [row for row in rows if not row[0].startswith("-")]
    assert [row[0] for row in rows] == ["processes", "2", "processes", "64", "256", "1,024", "4,096"]
    assert len(set(map(len, rows[:2]))) == len(set(map(len, rows[2:]))) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_verdict_is_on_the_median_of_the_rounds_ratios():
    figure = bench.Figure("a figure", "s", [2.0, 3.0, 9.0], 1.5, [2.0, 2.0, 1.0])
    assert figure.value == 1.5 and figure.good
    assert figure.row() == "| a figure | 3 (2-9) s | 2 (1-2) s | 1.500 (1.00-9.00) | ≤ 1.5 | yes |"
    assert not bench.Figure("a figure", "s", [2.0, 3.1, 9.0], 1.5, [2.0, 2.0, 1.0]).good
    slow = bench.Figure("a figure", "ms", [21.0], 20)
    assert slow.row() == "| a figure | 21 ms |  |  | ≤ 20 ms | **no** |"
    fast = bench.Figure("a figure", "samples/s", [1.0, 2.0], 0.98, [1.0, 2.0], at_least=True)
    assert fast.good and "| ≥ 0.98 |" in fast.row()


def test_rounds_alternate_and_their_order_rotates():
    order = []
    measures = [lambda name=name: order.append(name) or ord(name) for name in "abc"]
    assert bench.interleaved(3, *measures) == [[97] * 3, [98] * 3, [99] * 3]
    assert order == list("abcbcacab")


@pytest.mark.campaign
def test_a_short_ablation_prints_a_row_for_every_variant(tmp_path):
    lines = quick("bench_geometric.py", "--dir", tmp_path).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in rows[2:]] == list(bench.bench_geometric.VARIANTS)
    for row in rows[2:]:
        *losses, mean = map(float, row[1:])
        assert losses and mean == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert list(tmp_path.iterdir()) == []
