"""The benchmarks measure what they say; whether the figures are good is not asked here."""

import subprocess
import sys

import helpers as h

sys.path.insert(0, str(h.ROOT / "scripts"))
import bench

UNLIMITED = "to the last line", "to the prompt", "persistent_workers", "saved after every step"


def test_a_short_benchmark_prints_a_row_for_every_figure(tmp_path, whole):
    sections = list(bench.SECTIONS) if whole else ["hearing", "saving"]
    script = h.ROOT / "scripts" / "bench.py"
    command = [sys.executable, script, "--quick", "--dir", tmp_path, "--only", *sections]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "", result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("|")]
    # Behind the two lines of the table's head.
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert len(rows) == (14 if whole else 6)
    for name, ours, reference, ratio, wanted, _ in rows:
        assert float(ours.split()[0].replace(",", "")) > 0, name
        assert bool(reference) == bool(ratio) == (" / " in name)
        assert wanted.startswith("≤") != any(words in name for words in UNLIMITED), name
    # Nothing that was written for measuring is left.
    assert list(tmp_path.iterdir()) == []
