"""Checkpoints: atomic, damaged, hostile, kept, locked."""

import os
import pickle
import random
import signal
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import ENDLESS, ROOT, SCRIPT, refused, run, saved_path, wait_until

import train_graceful as t

KEYS = {"format_version", "model_state_dict", "optimizer_state_dicts", "scheduler_state_dicts", "mode", "loop", "step", "epoch",
        "batch_in_epoch", "best_loss", "config", "rng_state", "data_fingerprint", "exit_reason", "torch_version", "run_id", "saved_at"}


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A directory with the checkpoints of a finished small run, not to be changed."""
    directory = tmp_path_factory.mktemp("finished") / "ck"
    result = run("--data", corpus, "--checkpoint-dir", directory, "--context", "16", "--layers", "1", "--heads", "2", "--dim", "16",
                 "--experts", "2", "--batch-size", "4", "--steps", "12", "--eval-every", "5", "--save-every", "2", "--keep", "2")
    assert result.returncode == 0, result.stderr
    return directory


def assert_refused(message, *words):
    for word in words:
        assert str(word) in message


def test_layout_keys_and_retention(finished):
    assert sorted(path.name for path in finished.iterdir()) == ["best.pt", "final.pt", "metrics.csv", "run.lock", "step_10.pt", "step_12.pt"]
    for path in finished.glob("*.pt"):
        state = torch.load(path, weights_only=True)
        assert KEYS <= set(state) and state["format_version"] == 1
    assert torch.load(finished / "final.pt", weights_only=True)["exit_reason"] == "completed"
    assert torch.load(finished / "best.pt", weights_only=True)["best_loss"] < 6


def test_weights_load_elsewhere_without_this_program(finished):
    code = f"import torch; print(torch.load({str(finished / 'final.pt')!r}, weights_only=True)['model_state_dict']['head.weight'].shape)"
    result = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert result.stdout == "torch.Size([256, 16])\n"


def test_every_damaged_copy_is_refused_or_loads_the_exact_state(finished, tmp_path):
    whole = (finished / "final.pt").read_bytes()
    state = t.load_checkpoint(finished / "final.pt")
    rng = random.Random(1)
    path, refused = tmp_path / "damaged.pt", 0
    cases = [("flip", rng.randrange(len(whole) * 8)) for _ in range(400)]
    cases += [("flip", bit) for bit in range((len(whole) - 120) * 8, len(whole) * 8, 3)]  # the zip file's own directory
    cases += [("cut", length) for length in (0, 1, 30, len(whole) // 2, len(whole) - 1)] + [("zeros", n) for n in (1, 100, 5000)]
    for kind, where in cases:
        damaged = bytearray(whole)
        if kind == "flip":
            damaged[where // 8] ^= 1 << where % 8
        elif kind == "cut":
            del damaged[where:]
        else:
            damaged[-where:] = bytes(where)
        path.write_bytes(damaged)
        try:
            loaded = t.load_checkpoint(path)
        except t.CheckpointError as error:
            refused += 1
            assert str(path) in str(error)
        else:
            assert equal(loaded, state), (kind, where)
    assert refused > len(cases) * 0.6


def equal(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.equal(right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right


def flip_a_weight(path, into):
    """One bit of the last tensor in the file; torch.load does not notice."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        record = max((info for info in archive.infolist() if "/data/" in info.filename), key=lambda info: info.file_size)
    data[record.header_offset + 2000] ^= 1
    into.write_bytes(data)
    torch.load(into, weights_only=True)


def test_a_flipped_bit_in_a_weight_is_refused_in_one_line(finished, tmp_path):
    flip_a_weight(finished / "final.pt", tmp_path / "flipped.pt")
    result = run("--resume", tmp_path / "flipped.pt")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert_refused(result.stderr, "error: ", "flipped.pt: damaged checkpoint", "data/")


def test_latest_names_and_skips_damaged_ones(finished, tmp_path):
    for name in ("step_10.pt", "step_12.pt"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    flip_a_weight(finished / "final.pt", tmp_path / "final.pt")
    (tmp_path / "emergency_exit").mkdir()
    (tmp_path / "emergency_exit" / "emergency_step_13.pt").write_bytes((finished / "final.pt").read_bytes()[:5000])
    result = run("--resume", "latest", "--checkpoint-dir", tmp_path, "--steps", "14")
    assert result.returncode == 0
    assert "Skipped" in result.stdout and "emergency_step_13.pt" in result.stdout and "final.pt: damaged" in result.stdout
    assert "Completed Steps: 14" in result.stdout


def test_latest_prefers_the_newest_emergency_checkpoint(finished, tmp_path):
    (tmp_path / "step_10.pt").write_bytes((finished / "step_10.pt").read_bytes())
    (tmp_path / "emergency_exit").mkdir()
    newest = tmp_path / "emergency_exit" / "emergency_step_12.pt"
    newest.write_bytes((finished / "step_12.pt").read_bytes())
    assert t.latest_checkpoint(tmp_path) == newest
    os.utime(tmp_path / "step_10.pt", (2**33, 2**33))
    assert t.latest_checkpoint(tmp_path) == tmp_path / "step_10.pt"


class RunsCode:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("where", ["top", "optimizer", "config"])
def test_a_checkpoint_from_a_stranger_cannot_run_code(finished, tmp_path, where):
    state = t.load_checkpoint(finished / "final.pt")
    evil = RunsCode(tmp_path / "executed")
    if where == "top":
        state["saved_at"] = evil
    elif where == "optimizer":
        state["optimizer_state_dicts"]["adamw"]["state"][0]["exp_avg"] = evil
    else:
        state["config"]["mode"] = evil
    torch.save(state, tmp_path / "evil.pt", pickle_module=pickle)
    assert_refused(refused("--resume", tmp_path / "evil.pt"), "not a checkpoint")
    assert not (tmp_path / "executed").exists()


def altered(finished, path, change):
    state = t.load_checkpoint(finished / "final.pt")
    change(state)
    torch.save(state, path)
    return path


@pytest.mark.parametrize("change, word", [
    (lambda s: s.update(format_version=2), "format 2"),
    (lambda s: s.pop("format_version"), "format"),
    (lambda s: s.update(step="12"), "step"),
    (lambda s: s.pop("rng_state"), "rng_state"),
    (lambda s: s["config"].pop("dim"), "dim"),
    (lambda s: s["config"].update(dim="wide"), "dim"),
    (lambda s: s["config"].update(dim=32), "does not fit"),
    (lambda s: s["model_state_dict"].pop("head.weight"), "does not fit"),
    (lambda s: s["optimizer_state_dicts"].pop("adamw"), "does not fit"),
    (lambda s: s.update(data_fingerprint="0" * 32), "data"),
])
def test_a_checkpoint_of_another_format_or_size_is_refused(finished, tmp_path, change, word):
    path = altered(finished, tmp_path / "other.pt", change)
    assert_refused(refused("--resume", path, "--checkpoint-dir", tmp_path / "ck", "--steps", "14"), path, word)
    assert not (tmp_path / "ck").exists()


def test_a_checkpoint_from_a_stranger_cannot_choose_where_files_go(finished, tmp_path):
    def point_outside(state):
        state["metrics"]["file"] = "../outside.csv"
        state["run_id"] = "../../outside"

    path = altered(finished, tmp_path / "stranger.pt", point_outside)
    result = run("--resume", path, "--checkpoint-dir", tmp_path / "deep" / "ck", "--steps", "14")
    assert result.returncode == 0
    assert sorted(found.name for found in tmp_path.iterdir()) == ["deep", "stranger.pt"]
    assert [found.name for found in (tmp_path / "deep").iterdir()] == ["ck"]
    assert t.load_checkpoint(tmp_path / "deep" / "ck" / "final.pt")["run_id"] == "outside"


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    texts = {"text.pt": b"hello", "empty.pt": b""}
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
        assert_refused(refused("--resume", tmp_path / name), name)
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("hello", "world")
    assert_refused(refused("--resume", tmp_path / "zip.pt"), "zip.pt")
    assert_refused(refused("--resume", tmp_path), "directory")
    assert_refused(refused("--resume", tmp_path / "missing.pt"), "missing.pt: No such file")
    (tmp_path / "none").mkdir()
    assert_refused(refused("--resume", "latest", "--checkpoint-dir", tmp_path / "none"), "no checkpoint")


def test_a_second_run_on_the_directory_is_refused_with_the_first_ones_pid(options, tmp_path):
    first = subprocess.Popen([sys.executable, str(SCRIPT), *options, *ENDLESS], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        for line in first.stdout:
            if line.startswith(b"step"):
                break
        second = run(*options, "--steps", "5")
        assert second.returncode == 2 and len(second.stderr.splitlines()) == 1
        assert_refused(second.stderr, f"pid {first.pid}")
        first.send_signal(signal.SIGTERM)
        first.stdout.read()
        assert first.wait(timeout=60) == 143
    finally:
        first.kill()
        first.wait()
    assert run(*options, "--steps", "5").returncode == 0


def test_a_killed_run_leaves_no_lock_and_whole_checkpoints(options, tmp_path):
    process = subprocess.Popen([sys.executable, str(SCRIPT), *options, *ENDLESS[:2], "--save-every", "3", "--workers", "2"],
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_until(lambda: (tmp_path / "ck" / "step_30.pt").exists(), process)
    process.kill()
    process.wait()
    for path in (tmp_path / "ck").glob("*.pt"):
        t.load_checkpoint(path)
    (tmp_path / "ck" / ".step_99.pt.tmp").write_bytes(b"half")
    again = run("--resume", "latest", "--checkpoint-dir", tmp_path / "ck", "--steps", "500")
    assert again.returncode == 0
    assert not list((tmp_path / "ck").glob(".*.tmp"))


def test_another_runs_files_are_never_overwritten(options, tmp_path):
    schedule = ["--steps", "4", "--save-every", "2", "--eval-every", "2"]
    assert run(*options, *schedule).returncode == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "ck").iterdir() if path.name != "run.lock"}
    result = run(*options, *schedule, "--seed", "1")
    assert result.returncode == 0
    after = {path.name: path.read_bytes() for path in (tmp_path / "ck").iterdir()}
    assert {name: after[name] for name in before} == before
    assert {"final_2.pt", "best_2.pt", "step_2_2.pt", "step_4_2.pt", "metrics_2.csv"} <= set(after)
    assert saved_path(result.stdout).name == "final_2.pt"


def test_save_checkpoint_keeps_the_old_file_when_a_write_fails(tmp_path):
    code = f"""
import resource, torch, train_graceful as t
t.save_checkpoint({{"old": torch.ones(3)}}, {str(tmp_path / "a.pt")!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    t.save_checkpoint({{"new": torch.randn(10**6)}}, {str(tmp_path / "a.pt")!r})
except OSError as error:
    print("refused", error.errno)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "refused 27\n" and result.stderr == ""
    assert torch.equal(t.load_checkpoint(tmp_path / "a.pt")["old"], torch.ones(3))
    assert os.listdir(tmp_path) == ["a.pt"]


FULL_AFTER_START = """
import resource, sys, train_graceful as t
def begin(run, original=t.Run.begin):
    original(run)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
t.Run.begin = begin
sys.exit(t.main())
"""


def test_a_failed_periodic_save_is_reported_and_never_ends_the_run(options, tmp_path):
    result = subprocess.run([sys.executable, "-c", FULL_AFTER_START, *options, "--steps", "20", "--save-every", "8"], cwd=ROOT,
                            stdin=subprocess.DEVNULL, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert "⚠️ step_8.pt not saved: File too large. Training goes on." in result.stdout
    assert "step_16.pt not saved" in result.stdout and "Final checkpoint not saved" in result.stdout
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert not list((tmp_path / "ck").glob("*.pt"))


def test_host_copy_reuses_its_tensors():
    state = {"a": torch.ones(3), "b": [torch.zeros(2), {"c": 1}], "d": (1, "x")}
    copy = t.host_copy(state)
    state["a"].add_(1)
    again = t.host_copy(state, copy)
    assert again["a"].data_ptr() == copy["a"].data_ptr() != state["a"].data_ptr()
    assert again["a"].tolist() == [2, 2, 2] and again["b"][1] == {"c": 1} and again["d"] == (1, "x")
