"""Checkpoints: ordinary files of torch.save, atomic, damaged, hostile, kept, locked."""

import argparse
import collections
import datetime
import errno
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from helpers import (
    ENDLESS,
    ROOT,
    Forked,
    Moment,
    assert_same,
    finish,
    flip_a_weight,
    forked,
    metrics_without_times,
    refused,
    run,
    saved_path,
    session,
)

import train_graceful as t

KEYS = {
    "format_version",
    "model_state_dict",
    "optimizer_state_dicts",
    "scheduler_state_dicts",
    "state_dicts",
    "step",
    "best",
    "evaluation",
    "metrics",
    "config",
    "data_fingerprint",
    "stream",
    "made_by",
    "loop",
    "exit_reason",
    "torch_version",
    "run_id",
    "saved_at",
}


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A directory with the checkpoints of a finished small run, not to be changed."""
    directory = tmp_path_factory.mktemp("finished") / "ck"
    result = run(
        "--data",
        corpus,
        "--checkpoint-dir",
        directory,
        "--context",
        "16",
        "--layers",
        "1",
        "--heads",
        "2",
        "--dim",
        "16",
        "--experts",
        "2",
        "--batch-size",
        "4",
        "--steps",
        "12",
        "--eval-every",
        "5",
        "--save-every",
        "2",
        "--keep",
        "2",
    )
    assert result.returncode == 0, result.stderr
    return directory


def assert_refused(message, *words):
    for word in words:
        assert str(word) in message


@pytest.mark.parametrize(
    "value",
    [
        numpy.array(["x"]),
        numpy.array([None]),
        Path("x"),
        b"x",
        bytearray(b"x"),
        {(1, 2)},
        collections.defaultdict(int),
        argparse.Namespace(a=1),
        datetime.datetime.now(),
        2**2039,
        torch.eye(2).to_sparse(),
        {Path("x"): 1},
        {b"x": 1},
        torch.nn.Buffer(torch.ones(2)),
        lambda: None,
        torch.ones(2, device="meta"),
        torch.nn.Linear(1, 1),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, value):
    """Better a UserError today than a checkpoint that is refused when it is needed."""
    path = tmp_path / "a.pt"
    t.save_checkpoint({"old": 1}, path)
    with pytest.raises(t.UserError, match="cannot be saved"):
        t.save_checkpoint({"model": {"best": [1, value]}}, path)
    assert t.load_checkpoint(path) == {"old": 1} and os.listdir(tmp_path) == ["a.pt"]


def test_what_is_no_dict_is_not_saved(tmp_path):
    with pytest.raises(t.UserError, match="dict"):
        t.save_checkpoint([torch.ones(2)], tmp_path / "a.pt")
    assert not os.listdir(tmp_path)


def every_dtype() -> list[torch.Tensor]:
    """A tensor of random bits of each dtype that torch.save takes (quantized ones aside)."""
    found = []
    known = {*torch.storage._dtype_to_storage_type_map(), *torch.storage._new_dtypes()}
    for dtype in sorted(known, key=str):
        if not str(dtype).startswith(("torch.q", "torch.quint")):
            found.append(torch.empty(2, 3, dtype=dtype))
            bits_of(found[-1]).random_(2 if dtype == torch.bool else 256)
    return found


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def zoo() -> dict:
    """All that a state may hold."""
    torch.manual_seed(0)
    large, complex_ones = torch.randn(3_000_000), torch.ones(2, dtype=torch.complex64)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model.tied = model[0]
    return {
        5: [None, True, 1, 2.5, "text ü", (3,), 1j, {1, 2}, 10**30, collections.Counter({5: 1})],
        "types": [torch.bfloat16, torch.Size([2]), torch.device("cpu"), random.getstate()],
        "views": [large[5:9], large.view(1000, 3000).T, large[::2], large[:1].expand(4), large],
        "again": large,
        "small": [torch.tensor(3.0), torch.empty(0), torch.empty(0, 4), torch.empty(0)],
        "conjugate": [complex_ones + 1j, (complex_ones + 1j).conj()],
        "negative": (complex_ones + 2j).conj().imag,
        "model": model.state_dict(),
        "parameters": [model[0].weight, torch.nn.Parameter(torch.ones(2), requires_grad=False)],
        "dtypes": every_dtype(),
    }


def assert_as_saved(loaded, state) -> None:
    for tensor, other in zip(loaded["dtypes"], state["dtypes"], strict=True):
        assert tensor.dtype == other.dtype and bits_of(tensor).equal(bits_of(other))
    plain = state.keys() - {"dtypes", "parameters"}
    assert_same({key: loaded[key] for key in plain}, {key: state[key] for key in plain})
    weights = loaded["model"]
    assert weights["tied.weight"].data_ptr() == weights["0.weight"].data_ptr()
    assert weights._metadata == state["model"]._metadata


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("load", [torch.load, t.load_checkpoint])
def test_it_loads_as_what_was_saved(tmp_path, load):
    """Here and anywhere else: it is one ordinary file of torch.save."""
    state, path = zoo(), tmp_path / "a.pt"
    t.save_checkpoint(state, path)
    for mapped in (False, True):
        loaded = load(path, mmap=mapped)
        assert_as_saved(loaded, state)
        views = (*loaded["views"], loaded["again"])
        assert len({tensor.untyped_storage().data_ptr() for tensor in views}) == 1
        trained, frozen = loaded["parameters"]
        assert trained.requires_grad and not frozen.requires_grad
        assert type(trained) is type(frozen) is torch.nn.Parameter
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_a_copy_for_saving_is_of_one_moment_and_reuses_its_memory():
    state, memory = zoo(), {}
    first = t.to_host(state, memory)
    assert_as_saved(first, state)
    weight = state["again"]
    before = first["again"].clone()
    weight.add_(1)
    assert first["again"].equal(before)
    second = t.to_host(state, memory)
    assert second["again"].equal(weight)
    assert second["again"].data_ptr() == first["again"].data_ptr() != weight.data_ptr()
    number = torch.tensor([1 + 2j])
    pairs = {"whole": [number, number.conj()], "part": [number.imag, number.conj().imag]}
    assert_same(t.to_host(pairs, {}), pairs)


def test_numpys_scalars_are_saved_as_the_numbers_they_are(tmp_path):
    state = {
        "best": numpy.mean([0.5, 0.25]),
        numpy.int64(4): [numpy.float32(1.5), (numpy.int16(3),)],
        "done": numpy.bool_(False),
        "name": numpy.str_("x"),
    }
    t.save_checkpoint(state, tmp_path / "a.pt")
    loaded = t.load_checkpoint(tmp_path / "a.pt")
    assert_same(loaded, {"best": 0.375, 4: [1.5, (3,)], "done": False, "name": "x"})
    assert type(state["best"]) is numpy.float64


def test_checksums_are_written_even_where_torch_was_told_not_to(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        t.save_checkpoint({"a": torch.ones(3)}, tmp_path / "a.pt")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert t.load_checkpoint(tmp_path / "a.pt")["a"].tolist() == [1, 1, 1]


@pytest.mark.campaign
def test_a_file_of_more_than_4_gib(tmp_path):
    """The zip format says sizes and offsets in other places then."""
    state = {"zeros": torch.zeros(2**32 + 10**6, dtype=torch.uint8), "small": torch.arange(5)}
    t.save_checkpoint(state, tmp_path / "large.pt")
    loaded = t.load_checkpoint(tmp_path / "large.pt", mmap=True)
    assert loaded["small"].tolist() == [0, 1, 2, 3, 4] and len(loaded["zeros"]) > 2**32


WRITER = """
import sys, torch, train_graceful as t
value = float(sys.argv[2])
for _ in range(6):
    t.save_checkpoint({"x": torch.full((3_000_000,), value), "i": value}, sys.argv[1])
"""


def test_two_that_write_one_path_at_the_same_time_leave_the_file_of_one_of_them(tmp_path):
    """A loop of one's own that was started twice; or every rank saves. Threads and processes."""
    path = tmp_path / "mine.pt"

    def assert_one_of_two() -> None:
        state = t.load_checkpoint(path)
        assert state["x"].eq(state["i"]).all() and state["i"] in (1, 2)

    states = [{"x": torch.full((3_000_000,), i), "i": i} for i in (1.0, 2.0)]
    threads = [threading.Thread(target=t.save_checkpoint, args=(one, path)) for one in states]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_one_of_two()
    commands = [[sys.executable, "-c", WRITER, path, str(i)] for i in (1, 2)]
    writers = [Forked(one, cwd=ROOT, stderr=subprocess.PIPE, text=True) for one in commands]
    assert [writer.communicate()[1] for writer in writers] == ["", ""]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert_one_of_two()
    assert os.listdir(tmp_path) == ["mine.pt"]


MEMORY = """
import resource, sys, torch, train_graceful as t
state = {str(i): torch.randn(2_500_000) for i in range(40)}
unit = 1 if sys.platform == "darwin" else 1024
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
t.save_checkpoint({"a": torch.randn(2_000_000)}, sys.argv[1])
before = peak()
t.save_checkpoint(state, sys.argv[1])
print((peak() - before) / 400e6)
"""


def test_saving_takes_hardly_any_memory(tmp_path):
    command = [sys.executable, "-c", MEMORY, tmp_path / "a.pt"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert float(result.stdout) < 0.05, result.stderr


def test_layout_keys_and_retention(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        "best.pt",
        "final.pt",
        "metrics.csv",
        "run.lock",
        "step_10.pt",
        "step_12.pt",
    ]
    for path in finished.glob("*.pt"):
        state = torch.load(path, weights_only=True)
        assert KEYS == set(state) and state["format_version"] == 3
    assert torch.load(finished / "final.pt", weights_only=True)["exit_reason"] == "completed"
    assert torch.load(finished / "best.pt", weights_only=True)["best"]["value"] < 6


def test_weights_load_elsewhere_without_this_program(finished):
    code = f"import torch; print(torch.load({str(finished / 'final.pt')!r}, weights_only=True)['model_state_dict']['head.weight'].shape)"
    result = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert result.stdout == "torch.Size([256, 16])\n"


def test_a_flipped_bit_in_a_weight_is_refused_in_one_line(finished, tmp_path):
    flip_a_weight(finished / "final.pt", tmp_path / "flipped.pt")
    result = run("--resume", tmp_path / "flipped.pt")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert_refused(result.stderr, "error: ", "flipped.pt: damaged checkpoint", "data/")


@pytest.mark.parametrize("left", [0.0, 0.3, 0.999])
def test_a_cut_tail_is_refused(finished, tmp_path, left):
    content = (finished / "final.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: int(left * len(content))])
    assert_refused(refused("--resume", tmp_path / "cut.pt"), "cut.pt: damaged, or not a checkpoint")


class Runs:
    """Whoever unpickles it calls a function."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("function, argument", [(os.mkdir, None), (bytearray, 10**12)])
def test_no_code_in_a_strangers_file_runs(tmp_path, function, argument, protocol):
    """Not even what torch.load(weights_only=True) takes, an object of any size for instance."""
    trace, path = tmp_path / "it ran", tmp_path / "hostile.pt"
    hostile = {"a": Runs(function, argument or str(trace))}
    torch.save(hostile, path, pickle_protocol=protocol)
    for place in ("cpu", "meta"):
        with pytest.raises(t.CheckpointError, match="damaged, or not a checkpoint"):
            t.load_checkpoint(path, map_location=place)
    assert not trace.exists()


def test_latest_names_and_skips_damaged_ones(finished, tmp_path):
    for name in ("step_10.pt", "step_12.pt"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    flip_a_weight(finished / "final.pt", tmp_path / "final.pt")
    (tmp_path / "emergency_exit").mkdir()
    (tmp_path / "emergency_exit" / "emergency_step_13.pt").write_bytes(
        (finished / "final.pt").read_bytes()[:5000]
    )
    result = run("--resume", "latest", "--checkpoint-dir", tmp_path, "--steps", "14")
    assert result.returncode == 0
    assert (
        "Skipped" in result.stdout
        and "emergency_step_13.pt" in result.stdout
        and "final.pt: damaged" in result.stdout
    )
    assert "Completed Steps: 14" in result.stdout


def test_latest_passes_over_what_another_program_has_saved(finished, tmp_path, capfd):
    shutil.copytree(finished, tmp_path / "ck")
    t.save_checkpoint({"step": 4444, "model": torch.ones(3)}, tmp_path / "ck" / "step_4444.pt")
    assert session("--resume", "latest", "--checkpoint-dir", tmp_path / "ck", "--steps", "14") == 0
    assert "Completed Steps: 14" in capfd.readouterr().out


def saved_by(path, run_id, session, step, saved_at) -> Path:
    """A file that `latest` takes for a checkpoint; its modification time says nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"format_version": 3, "run_id": run_id, "step": step, "saved_at": saved_at}
    t.save_checkpoint({**state, "metrics": {"sessions": session}}, path)
    os.utime(path, (2**33 - 1000 * step,) * 2)
    return path


def test_latest_is_the_furthest_of_the_run_that_has_saved_last(tmp_path):
    saved_by(tmp_path / "step_900.pt", "other", 1, 900, "2026-01-01")
    saved_by(tmp_path / "best.pt", "mine", 1, 20, "2026-01-04")
    saved_by(tmp_path / "step_30.pt", "mine", 1, 30, "2026-01-02")
    furthest = saved_by(
        tmp_path / "emergency_exit" / "emergency_step_40.pt", "mine", 1, 40, "2026-01-03"
    )
    assert t.latest_checkpoint(tmp_path) == furthest
    again = saved_by(tmp_path / "step_25.pt", "mine", 2, 25, "2026-01-05")
    assert t.latest_checkpoint(tmp_path) == again, (
        "it was resumed from an older one on purpose, and goes on from there"
    )


def test_a_start_that_was_stopped_before_its_first_step_hides_no_trained_run(tmp_path):
    trained = saved_by(tmp_path / "step_30.pt", "mine", 1, 30, "2026-01-01")
    stopped = saved_by(
        tmp_path / "emergency_exit" / "emergency_step_0.pt", "new", 1, 0, "2026-01-02"
    )
    assert t.latest_checkpoint(tmp_path) == trained
    trained.unlink()
    assert t.latest_checkpoint(tmp_path) == stopped


def altered(finished, path, change):
    state = t.load_checkpoint(finished / "final.pt")
    change(state)
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda s: s.update(format_version=2), "not a checkpoint of this program and edition"),
        (lambda s: s.update(format_version=4), "not a checkpoint of this program"),
        (lambda s: s.update(format_version=torch.ones(3)), "this program"),
        (lambda s: s.pop("format_version"), "not a checkpoint of this program"),
        (lambda s: s["config"].update(dim=32), "does not fit"),
        (lambda s: s["config"].update(speed=1), "here is no --speed as in its run; --weights"),
        (lambda s: s["model_state_dict"].pop("head.weight"), "does not fit"),
        (
            lambda s: s["optimizer_state_dicts"].pop("adamw"),
            "kept by this run, but not in the checkpoint",
        ),
        (
            lambda s: s["state_dicts"].update(ema={}),
            "ema is in the checkpoint, but not kept by this run",
        ),
        (lambda s: s.update(data_fingerprint="0" * 32), "data"),
        (lambda s: s["data_fingerprint"].update(training=[3, None]), "the data is not what"),
        (lambda s: s.update(run_id="../../outside"), "not a checkpoint of this program"),
    ],
)
def test_a_checkpoint_of_another_format_or_size_is_refused(finished, tmp_path, change, word):
    path = altered(finished, tmp_path / "other.pt", change)
    assert_refused(
        refused("--resume", path, "--checkpoint-dir", tmp_path / "ck", "--steps", "14"), path, word
    )
    assert os.listdir(tmp_path) == ["other.pt"]


STRANGE = [None, True, 10**30, "x", float("nan"), [], [1], {}, {1: 2}, torch.ones(2), {"a": None}]
NEEDLESS = {"exit_reason", "torch_version", "saved_at"}
CHECKED = {
    "format_version", "run_id", "model_state_dict", "state_dicts", "best", "config",
    "data_fingerprint", "loop", "stream",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("key", sorted(CHECKED | NEEDLESS))
def test_whatever_stands_in_the_place_of_a_value_is_one_line(finished, tmp_path, key, capfd):
    """A traceback would be a bug; what no run needs to go on may be anything."""
    for value in STRANGE:
        path = altered(finished, tmp_path / "strange.pt", lambda s: s.update({key: value}))
        code = session("--resume", path, "--checkpoint-dir", tmp_path / "ck", "--steps", "13")
        errors = capfd.readouterr().err
        refusal = code == 2 and errors.startswith("error: ") and errors.count("\n") == 1
        assert refusal or code == 0 and not errors, (value, errors)
        needless = key in NEEDLESS or key == "state_dicts" and value in ([], {})
        assert refusal or needless, value


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("place", ["optimizer_state_dicts", "scheduler_state_dicts"])
def test_whatever_stands_in_the_place_of_a_part_is_one_line(finished, tmp_path, place):
    for value in STRANGE:
        path = altered(finished, tmp_path / "strange.pt", lambda s: s[place].update(adamw=value))
        assert "adamw" in refused("--resume", path, "--checkpoint-dir", tmp_path / "ck")


def test_a_metrics_file_of_another_program_is_left_alone(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "ck")
    (tmp_path / "ck" / "metrics.csv").write_text("year,rain\n1,20\n99,30\n")
    assert session("--resume", tmp_path / "ck" / "step_10.pt") == 0
    assert (tmp_path / "ck" / "metrics.csv").read_text() == "year,rain\n1,20\n99,30\n"
    own = metrics_without_times(tmp_path / "ck", "metrics_2.csv")
    assert own and own == metrics_without_times(finished)[-len(own) :]


@pytest.mark.parametrize(
    "tail", [b"\0\0\0\0\n13,1,x\n" + b"\0" * 30, b"13,0,5.1"], ids=["zeros", "torn"]
)
def test_what_a_power_cut_made_of_the_rows_after_the_checkpoint_is_cut_off(
    finished, tmp_path, tail
):
    shutil.copytree(finished, tmp_path / "ck")
    rows = (finished / "metrics.csv").read_bytes()
    (tmp_path / "ck" / "metrics.csv").write_bytes(rows + tail)
    assert session("--resume", "latest", "--checkpoint-dir", tmp_path / "ck", "--steps", "14") == 0
    assert (tmp_path / "ck" / "metrics.csv").read_bytes().startswith(rows)
    text = (tmp_path / "ck" / "metrics.csv").read_bytes()
    assert b"\0" not in text and [row["step"] for row in metrics_without_times(tmp_path / "ck")][
        -2:
    ] == ["12", "14"]


def test_latest_reads_the_tensors_of_one_checkpoint_alone(finished, tmp_path, monkeypatch):
    read = []

    def load(path, map_location="cpu", load=t.load_checkpoint, **options):
        read.append((path, map_location))
        return load(path, map_location, **options)

    monkeypatch.setattr(t, "load_checkpoint", load)
    shutil.copytree(finished, tmp_path / "ck")
    assert session("--resume", "latest", "--checkpoint-dir", tmp_path / "ck") == 0
    assert {path for path, place in read if place != "meta"} == {tmp_path / "ck" / "final.pt"}
    assert len(read) > 4


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
    assert_refused(
        refused("--resume", "latest", "--checkpoint-dir", tmp_path / "none"), "no checkpoint"
    )


def test_another_runs_files_are_never_overwritten(options, tmp_path, capfd):
    schedule = ["--steps", "4", "--save-every", "2", "--eval-every", "2"]
    assert session(*options, *schedule) == 0
    before = {
        path.name: path.read_bytes()
        for path in (tmp_path / "ck").iterdir()
        if path.name != "run.lock"
    }
    capfd.readouterr()
    assert session(*options, *schedule, "--seed", "1") == 0
    after = {path.name: path.read_bytes() for path in (tmp_path / "ck").iterdir()}
    assert {name: after[name] for name in before} == before
    assert {"final_2.pt", "best_2.pt", "step_2_2.pt", "step_4_2.pt", "metrics_2.csv"} <= set(after)
    assert saved_path(capfd.readouterr().out).name == "final_2.pt"


def test_a_device_or_a_pipe_is_never_replaced(tmp_path):
    """As root, saving to /dev/null would leave a machine without it."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError, match="is a directory, pipe or device"):
            t.save_checkpoint({"a": 1}, tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"] and stat.S_ISFIFO(
        os.stat(tmp_path / "pipe").st_mode
    )


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
    result = forked([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "refused 27\n" and result.stderr == ""
    assert torch.equal(t.load_checkpoint(tmp_path / "a.pt")["old"], torch.ones(3))
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_save_below_a_folder_that_may_not_be_listed():
    """As /home or a cluster's scratch space often are (mode 711): there the new name cannot be flushed, and need not be."""
    with tempfile.TemporaryDirectory() as folder:
        directory = t.Path(folder, "ck")
        directory.mkdir()
        os.chmod(folder, 0o711)
        os.chown(directory, 65534, 65534)
        pid = os.fork()
        if pid == 0:
            try:
                os.setuid(65534)
                t.save_checkpoint({"a": torch.ones(3)}, directory / "a.pt")
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert t.load_checkpoint(directory / "a.pt")["a"].tolist() == [1, 1, 1]


FULL_BEFORE_TRAINING = """
import resource, train_graceful as t
def loop(*arguments, original=t.standard_training_loop):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    original(*arguments)
t.standard_training_loop = loop
t.main(t.train, **t.OPTIONS)
"""


def test_a_failed_periodic_save_is_reported_and_never_ends_the_run(options, tmp_path):
    result = forked(
        [
            sys.executable,
            "-c",
            FULL_BEFORE_TRAINING,
            *options,
            "--steps",
            "20",
            "--save-every",
            "8",
            "--eval-every",
            "12",
        ],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert "⚠️ step_8.pt not saved: File too large. Training goes on." in result.stdout
    assert "⚠️ best.pt not saved: File too large. Training goes on." in result.stdout
    assert "step_16.pt not saved" in result.stdout and "Final checkpoint not saved" in result.stdout
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert not list((tmp_path / "ck").glob("*.pt"))


def test_a_copy_that_does_not_fit_into_memory_never_ends_the_run(
    options, tmp_path, monkeypatch, capfd
):
    copies = []

    def to_host(state, memory=None, original=t.to_host):
        if memory is not None:
            copies.append(state["step"])
        return torch.empty(2**60) if copies == [2] else original(state, memory)

    monkeypatch.setattr(t, "to_host", to_host)
    schedule = ["--steps", 6, "--save-every", 2, "--eval-every", 100, "--keep", 9]
    assert session(*options, *schedule) == 0
    output = capfd.readouterr().out
    assert output.count("not saved") == 1 and "⚠️ step_2.pt not saved: " in output
    names = {path.name for path in (tmp_path / "ck").glob("*.pt")}
    assert names == {"step_4.pt", "step_6.pt", "final.pt", "best.pt"}


def test_rows_are_written_whole_while_a_save_flushes_them(tmp_path):
    directory = t.RunDirectory(tmp_path, "0123456789ab", 0, 3, print)
    steps = range(1, 4001)
    for step in steps:
        # A new column: the whole file is written anew.
        directory.add_row({"step": step, "loss": 1.5, **({"late": 1} if step > 2000 else {})})
        if step % 20 == 0:
            directory.save_meanwhile({"run_id": "0123456789ab"}, {"periodic": "best.pt"}, False)
    directory.wait()
    directory.close()
    rows = metrics_without_times(tmp_path)
    assert [row["step"] for row in rows] == [str(step) for step in steps]
    assert [row["late"] for row in rows] == [""] * 2000 + ["1"] * 2000


def test_a_directory_that_is_deleted_under_a_run_costs_no_save(spawn, options, tmp_path):
    child = spawn(*options, *ENDLESS)
    child.expect(r"step \d+/")
    shutil.rmtree(tmp_path / "ck")
    child.sendline("s")
    child.expect("Checkpoint saved: ")
    child.sendline("q")
    path = saved_path(finish(child))
    assert (
        child.exitstatus == 0
        and path.parent == tmp_path / "ck" / "emergency_exit"
        and t.load_checkpoint(path)["step"]
    )


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_named_in_one_line(fork, options, tmp_path, code):
    """Lustre without -o flock, NFS without lockd."""

    def no_locks(frame) -> None:
        def lockf(*arguments):
            raise OSError(code, os.strerror(code))

        frame.f_globals["fcntl"].lockf = lockf

    child = fork(*options, "--steps", 4, plan=[(Moment("train"), no_locks)])
    output = child.finish()
    assert (
        child.exitcode == 0
        and output.count("no locks there") == 1
        and f"({os.strerror(code)})" in output
    )
    assert t.load_checkpoint(tmp_path / "ck" / "final.pt")["step"] == 4


def lacking(call: str, code: int, concerns):
    """Puts something in the place of os.call that fails where concerns(its first argument) is true."""

    def install(frame) -> None:
        real = getattr(os, call)

        def without(first, *rest):
            if concerns(first):
                raise OSError(code, os.strerror(code))
            return real(first, *rest)

        setattr(os, call, without)

    return install


def is_folder(which) -> bool:
    return stat.S_ISDIR(os.stat(which).st_mode) if os.path.exists(which) else False


LACKING = {
    "fsync of directories": ("fsync", errno.EINVAL, is_folder),
    "fsync": ("fsync", errno.ENOSYS, lambda fd: True),
    "advice": ("posix_fadvise", errno.EINVAL, lambda fd: True),
    "opening of directories": ("open", errno.EACCES, is_folder),
}


@pytest.mark.parametrize("what", LACKING)
def test_what_a_file_system_lacks_is_no_failed_save(fork, options, tmp_path, what):
    """FUSE and network file systems, and directories that may be written but not listed."""
    child = fork(
        *options, "--steps", 4, "--save-every", 2, plan=[(Moment("train"), lacking(*LACKING[what]))]
    )
    output = child.finish()
    assert child.exitcode == 0 and "not saved" not in output, output
    assert t.load_checkpoint(tmp_path / "ck" / "final.pt")["step"] == 4
    assert not list((tmp_path / "ck").rglob("*.tmp"))


def with_bom(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "change, name",
    [(with_bom, "metrics.csv"), (piped, "metrics_2.csv"), (Path.unlink, "metrics.csv")],
)
def test_whatever_a_person_has_made_of_metrics_csv_the_run_goes_on(
    finished, tmp_path, change, name
):
    """A spreadsheet has saved it, as spreadsheets do; a pipe stands in its place; it is gone."""
    directory = shutil.copytree(finished, tmp_path / "ck")
    steps = [row["step"] for row in metrics_without_times(directory)]
    change(directory / "metrics.csv")
    assert session("--resume", directory / "final.pt", "--steps", "14") == 0
    now = [row["step"] for row in metrics_without_times(directory, name)]
    assert now == [*(steps if change is with_bom else []), "14"]


def test_a_checkpoint_of_another_pytorch_loads_as_far_as_pytorch_takes_it(
    finished, tmp_path, capfd
):
    """A newer one has added an option to AdamW's groups; and a newer edition a key."""

    def change(state: dict) -> None:
        group = state["optimizer_state_dicts"]["adamw"]["param_groups"][0]
        group.pop("decoupled_weight_decay")
        state.update(torch_version="2.6.0", more=[1])

    path = altered(finished, tmp_path / "older.pt", change)
    assert session("--resume", path, "--checkpoint-dir", tmp_path / "ck", "--steps", "14") == 0
    assert "Completed Steps: 14" in capfd.readouterr().out


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda o: o.update({"class": "SGD"}), "does not fit adamw (class: SGD there, AdamW here)"),
        (lambda o: o["param_names"][0].reverse(), "does not fit adamw (param_names: "),
        (lambda o: o["param_names"][0].pop(), "does not fit adamw (param_names: "),
    ],
)
def test_an_optimizers_state_only_goes_to_the_same_optimizer_over_the_same_parameters(
    finished, tmp_path, change, words
):
    """PyTorch would take it, shapes and all, as long as there are as many."""
    path = altered(
        finished, tmp_path / "other.pt", lambda s: change(s["optimizer_state_dicts"]["adamw"])
    )
    assert_refused(
        refused("--resume", path, "--checkpoint-dir", tmp_path / "ck", "--steps", "14"),
        "does not fit",
        words,
    )
