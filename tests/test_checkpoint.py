"""A checkpoint is one ordinary file, whole at every instant, and refused in a line where it is not.

What it holds, what a directory of them holds, which of them is the latest, and what a run does where
a file or a directory is not as it left it.
"""

import argparse
import collections
import datetime
import errno
import fcntl
import functools
import multiprocessing
import os
import random
import resource
import shutil
import stat
import threading
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from helpers import (
    ENDLESS,
    TINY,
    Moment,
    assert_same,
    fail,
    flip_a_weight,
    metrics_without_times,
    refused,
    run,
    saved_path,
    session,
    whole_files,
)

import train_graceful as t

KEYS = """format_version model_state_dict optimizer_state_dicts scheduler_state_dicts state_dicts
step best evaluation metrics config data_fingerprint stream loop made_by exit_reason torch_version run_id
saved_at""".split()


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A directory with the checkpoints of a finished small run, not to be changed."""
    directory = tmp_path_factory.mktemp("finished") / "ck"
    schedule = "--steps 12 --eval-every 5 --save-every 2 --keep 2".split()
    result = run("--data", corpus, "--checkpoint-dir", directory, *TINY, *schedule)
    assert result.returncode == 0, result.stderr
    return directory


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(finished, tmp_path / "ck")


@pytest.fixture
def altered(finished, tmp_path):
    """altered(change) is final.pt as change(its state) has made it, and the words that resume it."""

    def alter(change) -> tuple[Path, list]:
        state, path = t.load_checkpoint(finished / "final.pt"), tmp_path / "altered.pt"
        change(state)
        torch.save(state, path)
        return path, ["--resume", path, "--checkpoint-dir", tmp_path / "ck", "--steps", 14]

    return alter


# ---- what is saved, and loads as that

UNSAVABLE = [
    *[numpy.array(["x"]), numpy.array([None]), datetime.datetime.now(), 2**2039, lambda: None],
    *[Path("x"), b"x", bytearray(b"x"), {(1, 2)}, {Path("x"): 1}, {b"x": 1}],
    *[collections.defaultdict(int), argparse.Namespace(a=1), torch.nn.Linear(1, 1)],
    *[torch.eye(2).to_sparse(), torch.nn.Buffer(torch.ones(2)), torch.ones(2, device="meta")],
]


@pytest.mark.parametrize("value", UNSAVABLE)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, value):
    """Better a UserError today than a checkpoint that is refused when it is needed."""
    path = tmp_path / "a.pt"
    t.save_checkpoint({"old": 1}, path)
    with pytest.raises(t.UserError, match="cannot be saved"):
        t.save_checkpoint({"model": {"best": [1, value]}}, path)
    with pytest.raises(t.UserError, match="dict"):
        t.save_checkpoint([value], path)
    assert t.load_checkpoint(path) == {"old": 1} and os.listdir(tmp_path) == ["a.pt"]


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
@pytest.mark.parametrize("crc32", [True, False])
def test_it_loads_as_what_was_saved(tmp_path, load, crc32):
    """Here and anywhere else; with checksums even where torch was told to leave them out."""
    state, path = zoo(), tmp_path / "a.pt"
    torch.serialization.set_crc32_options(crc32)
    try:
        t.save_checkpoint(state, path)
        assert torch.serialization.get_crc32_options() == crc32
    finally:
        torch.serialization.set_crc32_options(True)
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
    numbers = [numpy.float32(1.5), (numpy.int16(3),)]
    state = {"best": numpy.mean([0.5, 0.25]), numpy.int64(4): numbers, "done": numpy.bool_(False)}
    t.save_checkpoint({**state, "name": numpy.str_("x")}, tmp_path / "a.pt")
    loaded = t.load_checkpoint(tmp_path / "a.pt")
    assert_same(loaded, {"best": 0.375, 4: [1.5, (3,)], "done": False, "name": "x"})
    assert type(state["best"]) is numpy.float64


# ---- how it is saved


def test_all_that_write_one_path_at_the_same_time_leave_the_file_of_one_of_them(tmp_path):
    """A loop of one's own that was started twice; or every rank saves. Threads and processes."""
    path = tmp_path / "mine.pt"

    def write(value: float) -> None:
        for _ in range(6):
            t.save_checkpoint({"x": torch.full((3_000_000,), value), "i": value}, path)

    process = multiprocessing.get_context("fork").Process
    writers = [
        kind(target=write, args=(i,)) for kind in (process, threading.Thread) for i in (1, 2)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers[:2]] == [0, 0]
    state = t.load_checkpoint(path)
    assert state["x"].eq(state["i"]).all() and os.listdir(tmp_path) == ["mine.pt"]


def test_saving_takes_hardly_any_memory(fork, tmp_path):
    peaks, large = [], {str(i): torch.randn(2_500_000) for i in range(40)}
    for state in ({"a": torch.randn(2_000_000)}, large):
        child = fork(program=functools.partial(t.save_checkpoint, state, tmp_path / "a.pt"))
        child.finish()
        assert child.exitcode == 0
        peaks.append(child.peak * 1024)
    assert peaks[1] - peaks[0] < 0.05 * 400e6


def test_a_device_or_a_pipe_is_never_replaced(tmp_path):
    """As root, saving to /dev/null would leave a machine without it."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError, match="is a directory, pipe or device"):
            t.save_checkpoint({"a": 1}, tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def limit_files(frame) -> None:
    """What is written beyond that fails; Python ignores the signal."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


COPIED = Moment("copy", where=lambda frame: frame.f_locals["memory"] is not None)
FAILING = {
    "a full disk": (Moment("loss"), limit_files, "File too large", 1, set()),
    "no memory for a copy": (COPIED, fail, "injected", 0, {"step_6.pt", "best.pt", "final.pt"}),
}


@pytest.mark.parametrize("what", FAILING)
def test_a_failed_save_is_reported_and_never_ends_the_run(fork, options, tmp_path, what):
    moment, act, error, code, left = FAILING[what]
    schedule = "--steps 6 --save-every 3 --eval-every 6".split()
    child = fork(*options, *schedule, plan=[(moment, act)], TMPDIR=str(tmp_path))
    output = child.finish()
    assert f"⚠️ step_3.pt not saved: {error}. Training goes on." in output
    assert (f"⚠️ best.pt not saved: {error}. Training goes on." in output) == bool(code)
    assert ("Final checkpoint not saved" in output) == bool(code) and "Traceback" not in output
    assert child.exitcode == code and {*whole_files(tmp_path / "ck")} == left


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


def test_a_directory_that_is_deleted_under_a_run_costs_no_save(fork, options, tmp_path):
    child = fork(*options, *ENDLESS)
    child.terminal.expect(r"step \d+/")
    shutil.rmtree(tmp_path / "ck")
    child.terminal.sendline("s")
    child.terminal.expect("Checkpoint saved: ")
    child.terminal.sendline("q")
    path = saved_path(child.finish())
    assert child.exitcode == 0 and path.parent == tmp_path / "ck" / "emergency_exit"
    assert t.load_checkpoint(path)["step"]


def lacking(module, call: str, code: int, concerns, frame) -> None:
    """A function in the place of module.call fails where concerns(its first argument) is true."""
    real = getattr(module, call)

    def without(first, *rest):
        if concerns(first):
            raise OSError(code, os.strerror(code))
        return real(first, *rest)

    setattr(module, call, without)


def is_folder(which) -> bool:
    return os.path.exists(which) and stat.S_ISDIR(os.stat(which).st_mode)


# Lustre without -o flock, NFS without lockd; FUSE and network file systems; no right to list.
LACKING = {
    "locks": (fcntl, "lockf", errno.ENOLCK, bool),
    "locks, not implemented": (fcntl, "lockf", errno.ENOSYS, bool),
    "locks, not supported": (fcntl, "lockf", errno.ENOTSUP, bool),
    "fsync of directories": (os, "fsync", errno.EINVAL, is_folder),
    "fsync": (os, "fsync", errno.ENOSYS, bool),
    "advice": (os, "posix_fadvise", errno.EINVAL, bool),
    "opening of directories": (os, "open", errno.EACCES, is_folder),
}


@pytest.mark.parametrize("what", LACKING)
def test_what_a_file_system_lacks_is_no_failed_save(fork, options, tmp_path, what):
    """That there are no locks is named in a line."""
    plan = [(Moment("train"), functools.partial(lacking, *LACKING[what]))]
    child = fork(*options, "--steps", 4, "--save-every", 2, plan=plan)
    output = child.finish()
    assert child.exitcode == 0 and "not saved" not in output, output
    reason = f"({os.strerror(LACKING[what][2])})"
    assert [output.count("no locks there"), output.count(reason)] == [what.startswith("locks")] * 2
    assert t.load_checkpoint(tmp_path / "ck" / "final.pt")["step"] == 4
    assert not list((tmp_path / "ck").rglob("*.tmp"))


# ---- what is in a directory, and which is the latest


def test_layout_keys_and_retention(finished):
    found = " ".join(sorted(path.name for path in finished.iterdir()))
    assert found == "best.pt final.pt metrics.csv run.lock step_10.pt step_12.pt"
    for path in finished.glob("*.pt"):
        state = torch.load(path, weights_only=True)
        assert {*KEYS} == {*state} and state["format_version"] == 3
    assert torch.load(finished / "final.pt", weights_only=True)["exit_reason"] == "completed"
    assert torch.load(finished / "best.pt", weights_only=True)["best"]["value"] < 6


def test_another_runs_files_are_never_overwritten(options, tmp_path, capfd):
    schedule = ["--steps", "4", "--save-every", "2", "--eval-every", "2"]
    assert session(*options, *schedule) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "ck").iterdir()}
    before.pop("run.lock")
    capfd.readouterr()
    assert session(*options, *schedule, "--seed", "1") == 0
    after = {path.name: path.read_bytes() for path in (tmp_path / "ck").iterdir()}
    assert {name: after[name] for name in before} == before
    assert {"final_2.pt", "best_2.pt", "step_2_2.pt", "step_4_2.pt", "metrics_2.csv"} <= {*after}
    assert saved_path(capfd.readouterr().out).name == "final_2.pt"


def test_latest_reads_no_tensors_in_vain_and_skips_what_is_damaged_or_of_another_program(
    finished, copied, monkeypatch, capfd
):
    (copied / "best.pt").unlink()
    flip_a_weight(finished / "final.pt", copied / "final.pt")
    cut = copied / "emergency_exit" / "emergency_step_13.pt"
    cut.parent.mkdir()
    cut.write_bytes((finished / "final.pt").read_bytes()[:5000])
    t.save_checkpoint({"step": 4444, "model": torch.ones(3)}, copied / "step_4444.pt")
    read = []

    def load(path, map_location="cpu", original=t.load_checkpoint, **options):
        read.append((path.name, map_location))
        return original(path, map_location, **options)

    monkeypatch.setattr(t, "load_checkpoint", load)
    assert session("--resume", "latest", "--checkpoint-dir", copied, "--steps", 14) == 0
    output = capfd.readouterr().out
    assert "Skipped" in output and "emergency_step_13.pt" in output
    assert "final.pt: damaged" in output and "Completed Steps: 14" in output
    assert {name for name, place in read if place != "meta"} == {"final.pt", "step_12.pt"}
    assert len({name for name, place in read if place == "meta"}) == 5


def test_latest_is_the_furthest_of_the_run_that_has_saved_last(tmp_path):
    def saved(name: str, run_id: str, session: int, step: int, saved_at: str) -> Path:
        """The modification time of the file says nothing."""
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        state = {"format_version": 3, "run_id": run_id, "step": step, "saved_at": saved_at}
        t.save_checkpoint({**state, "metrics": {"sessions": session}}, path)
        os.utime(path, (2**33 - 1000 * step,) * 2)
        return path

    stopped = saved("emergency_exit/emergency_step_0.pt", "new", 1, 0, "2026-01-07")
    assert t.latest_checkpoint(tmp_path) == stopped
    # One that was stopped before its first step hides no trained run.
    saved("step_900.pt", "other", 1, 900, "2026-01-01")
    saved("best.pt", "mine", 1, 20, "2026-01-04")
    saved("step_30.pt", "mine", 1, 30, "2026-01-02")
    furthest = saved("emergency_exit/emergency_step_40.pt", "mine", 1, 40, "2026-01-03")
    assert t.latest_checkpoint(tmp_path) == furthest
    # It was resumed from an older one on purpose, and goes on from there.
    again = saved("step_25.pt", "mine", 2, 25, "2026-01-05")
    assert t.latest_checkpoint(tmp_path) == again


def with_bom(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def and_then(tail: bytes):
    return lambda path: path.write_bytes(path.read_bytes() + tail)


# What became of metrics.csv, where the rows are written then, and whether the old ones stay there.
RAIN = b"year,rain\n1,20\n99,30\n"
METRICS = {
    "saved by a spreadsheet": (with_bom, "metrics.csv", True),
    "torn by a power cut": (and_then(b"13,0,5.1"), "metrics.csv", True),
    "zeros after a power cut": (and_then(b"\0\0\0\n13,1,x\n" + b"\0" * 30), "metrics.csv", True),
    "gone": (Path.unlink, "metrics.csv", False),
    "a pipe": (piped, "metrics_2.csv", False),
    "another program's": (lambda path: path.write_bytes(RAIN), "metrics_2.csv", False),
}


@pytest.mark.parametrize("what", METRICS)
def test_whatever_has_become_of_metrics_csv_the_run_goes_on(finished, copied, what):
    change, name, stay = METRICS[what]
    change(copied / "metrics.csv")
    assert session("--resume", copied / "final.pt", "--steps", "14") == 0
    *old, new = metrics_without_times(copied, name)
    assert old == (metrics_without_times(finished) if stay else []) and new["step"] == "14"
    assert b"\0" not in (copied / name).read_bytes()
    if what == "another program's":
        assert (copied / "metrics.csv").read_bytes() == RAIN


# ---- what is refused


def test_a_damaged_one_is_refused_in_one_line(finished, tmp_path):
    flip_a_weight(finished / "final.pt", tmp_path / "flipped.pt")
    result = run("--resume", tmp_path / "flipped.pt")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ") and "data/" in result.stderr
    assert "flipped.pt: damaged checkpoint" in result.stderr


def test_what_is_no_checkpoint_is_refused(finished, tmp_path):
    whole = (finished / "final.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("hello", "world")
    zipped = (tmp_path / "other.pt").read_bytes()
    for content in (b"", b"hello", zipped, whole[: len(whole) // 3], whole[:-300]):
        (tmp_path / "other.pt").write_bytes(content)
        message = refused("--resume", tmp_path / "other.pt")
        assert "other.pt: damaged, or not a checkpoint" in message
    assert "directory" in refused("--resume", tmp_path)
    assert "missing.pt: No such file" in refused("--resume", tmp_path / "missing.pt")
    nowhere = ["--checkpoint-dir", tmp_path / "none"]
    assert "no checkpoint" in refused("--resume", "latest", *nowhere)


def adamw(change):
    return lambda state: change(state["optimizer_state_dicts"]["adamw"])


# PyTorch would take another optimizer's state, as long as there are as many shapes that fit.
OTHERS = [
    (lambda s: s.update(format_version=2), "not a checkpoint of this program and edition"),
    (lambda s: s.update(format_version=4), "not a checkpoint of this program"),
    (lambda s: s.update(format_version=torch.ones(3)), "this program"),
    (lambda s: s.pop("format_version"), "not a checkpoint of this program"),
    (lambda s: s.update(run_id="../../outside"), "not a checkpoint of this program"),
    (lambda s: s["config"].update(dim=32), "does not fit"),
    (lambda s: s["config"].update(speed=1), "here is no --speed as in its run; --weights"),
    (lambda s: s["model_state_dict"].pop("head.weight"), "does not fit"),
    (lambda s: s["optimizer_state_dicts"].pop("adamw"), "kept by this run, but not in the check"),
    (lambda s: s["state_dicts"].update(ema={}), "ema is in the checkpoint, but not kept by this"),
    (lambda s: s.update(data_fingerprint="0" * 32), "data"),
    (lambda s: s["data_fingerprint"].update(training=[3, None]), "the data is not what"),
    (adamw(lambda o: o.update({"class": "SGD"})), "fit adamw (class: SGD there, AdamW here)"),
    (adamw(lambda o: o["param_names"][0].reverse()), "does not fit adamw (param_names: "),
    (adamw(lambda o: o["param_names"][0].pop()), "does not fit adamw (param_names: "),
]


@pytest.mark.parametrize("change, words", OTHERS)
def test_a_checkpoint_of_another_format_or_run_is_refused(altered, tmp_path, change, words):
    path, resumed = altered(change)
    message = refused(*resumed)
    assert str(path) in message and words in message
    assert os.listdir(tmp_path) == ["altered.pt"]


def test_a_checkpoint_of_another_pytorch_loads_as_far_as_pytorch_takes_it(altered, capfd):
    """A newer one has added an option to AdamW's groups; and a newer edition a key."""

    def change(state: dict) -> None:
        state["optimizer_state_dicts"]["adamw"]["param_groups"][0].pop("decoupled_weight_decay")
        state.update(torch_version="2.6.0", more=[1])

    assert session(*altered(change)[1]) == 0
    assert "Completed Steps: 14" in capfd.readouterr().out


STRANGE = [None, True, 10**30, "x", float("nan"), [], [1], {}, {1: 2}, torch.ones(2), {"a": None}]
NEEDLESS = ["exit_reason", "torch_version", "saved_at"]
CHECKED = """format_version run_id model_state_dict state_dicts best config data_fingerprint loop
stream""".split()
PARTS = ["optimizer_state_dicts", "scheduler_state_dicts"]


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("key", [*CHECKED, *NEEDLESS, *PARTS])
def test_whatever_stands_in_the_place_of_a_value_is_one_line(altered, key, capfd):
    """A traceback would be a bug; what no run needs to go on may be anything."""
    for value in STRANGE:
        change = {key: {"adamw": value} if key in PARTS else value}
        code = session(*altered(lambda state: state.update(change))[1])
        errors = capfd.readouterr().err
        refusal = code == 2 and errors.startswith("error: ") and errors.count("\n") == 1
        assert refusal or code == 0 and not errors, (value, errors)
        needless = key in NEEDLESS or key == "state_dicts" and value in ([], {})
        assert refusal or needless, value
        assert "adamw" in errors or key not in PARTS
