"""The benchmark measures what README says it does; whether the figures are good is not asked here."""

import json
import math
import subprocess
import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import bench


def test_a_short_benchmark_prints_a_row_for_every_figure_and_appends_them_as_json(tmp_path, whole):
    json_file = tmp_path / "bench.jsonl"
    sections = [name for name in bench.SECTIONS if name != "gpu"] if whole else ["watching", "data"]
    result = subprocess.run([sys.executable, str(ROOT / "scripts" / "bench.py"), "--quick", "--dir", str(tmp_path), "--json", str(json_file),
                             "--only", *sections], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    [line] = json_file.read_text().splitlines()
    measured = json.loads(line)
    assert measured["cores"] and measured["torch"] and measured["quick"] is True
    assert {figure["section"] for figure in measured["figures"]} == set(sections)
    for figure in measured["figures"]:
        assert all(map(math.isfinite, figure["ours"] + (figure["reference"] or []))) and figure["ours"], figure
        assert f"| {figure['name']} | " in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["bench.jsonl"]  # and nothing it wrote for measuring is left


def test_a_short_scaling_benchmark_prints_what_it_measured_and_what_follows_from_it(tmp_path):
    result = subprocess.run([sys.executable, str(ROOT / "scripts" / "bench_scaling.py"), "--quick", "--dir", str(tmp_path)], cwd=ROOT,
                            capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["processes", "2", "processes", "64", "256", "1,024", "4,096"]
    assert len(set(map(len, rows[:2]))) == len(set(map(len, rows[2:]))) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_verdict_is_on_the_median_of_the_rounds_ratios():
    figure = bench.Figure("section", "a figure", "s", [2.0, 3.0, 9.0], 1.5, [2.0, 2.0, 1.0])
    assert figure.value == 1.5 and figure.good
    assert figure.row() == "| a figure | 3 (2-9) s | 2 (1-2) s | 1.500 (1.00-9.00) | ≤ 1.5 | yes |"
    assert not bench.Figure("section", "a figure", "s", [2.0, 3.1, 9.0], 1.5, [2.0, 2.0, 1.0]).good
    slow = bench.Figure("section", "a figure", "ms", [1.0] * 98 + [21.0] * 2, 20, verdict_on=bench.percentile(0.99))
    assert slow.value == 21 and not slow.good and "| **no** |" in slow.row()


def test_rounds_alternate_and_their_order_rotates():
    order = []
    assert bench.interleaved(3, *[lambda name=name: order.append(name) or ord(name) for name in "abc"]) == [[97] * 3, [98] * 3, [99] * 3]
    assert order == list("abcbcacab")
