"""A checkpoint is one ordinary file, whole at every instant; one that is not is refused."""

import collections
import datetime
import errno
import fcntl
import functools
import os
import random
import resource
import shutil
from pathlib import Path

import helpers as h
import pytest
import torch

import train_graceful as t

KEYS = """format_version model_state_dict optimizer_state_dicts scheduler_state_dicts state_dicts
step best evaluation metrics config data_fingerprint stream loop made_by exit_reason torch_version
run_id saved_at""".split()


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A directory with the checkpoints of a finished small run, not to be changed."""
    directory = tmp_path_factory.mktemp("finished") / "ck"
    schedule = "--steps 12 --eval-every 5 --save-every 2 --keep 2".split()
    result = h.run("--data", corpus, "--checkpoint-dir", directory, *h.TINY, *schedule)
    assert result.returncode == 0, result.stderr
    return directory


@pytest.fixture
def altered(finished, tmp_path):
    """altered(change): final.pt as change(its state) has made it, and the words that resume it."""

    def alter(change) -> tuple[Path, list]:
        state, path = t.load_checkpoint(finished / "final.pt"), tmp_path / "altered.pt"
        change(state)
        torch.save(state, path)
        return path, ["--resume", path, "--checkpoint-dir", tmp_path / "ck", "--steps", 14]

    return alter


# ---- what is saved, and loads as that

UNSAVABLE = [
    *[datetime.datetime.now(), 2**2039, lambda: None, Path("x"), b"x", {(1, 2)}, {b"x": 1}],
    *[collections.defaultdict(int), torch.nn.Linear(1, 1), torch.eye(2).to_sparse()],
    *[torch.nn.Buffer(torch.ones(2)), torch.ones(2, device="meta")],
]


@pytest.mark.parametrize("value", UNSAVABLE)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, value):
    path = tmp_path / "a.pt"
    t.save_checkpoint({"old": 1}, path)
    with pytest.raises(t.UserError, match="cannot be saved"):
        t.save_checkpoint({"model": {"best": [1, value]}}, path)
    with pytest.raises(t.UserError, match="dict"):
        t.save_checkpoint([value], path)
    assert t.load_checkpoint(path) == {"old": 1} and os.listdir(tmp_path) == ["a.pt"]


DTYPES = "bool uint8 uint16 int8 int64 float16 bfloat16 float64 float8_e4m3fn complex64".split()


def zoo() -> dict:
    """All that a state may hold."""
    torch.manual_seed(0)
    large = torch.randn(3_000_000)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model.tied = model[0]
    one, other, square = torch.tensor([1 + 2j]), torch.tensor([1 + 2j]), torch.randn(2, 2)
    return {
        5: [None, True, 1, 2.5, "text ü", (3,), 1j, {1, 2}, 10**30, collections.Counter({5: 1})],
        "types": [torch.bfloat16, torch.Size([2]), torch.device("cpu"), random.getstate()],
        "views": [large[5:9], large.view(1000, 3000).T, large[::2], large[:1].expand(4), large],
        "again": large,
        "square": [square, square.T],
        "small": [torch.tensor(3.0), torch.empty(0), torch.empty(0, 4), torch.empty(0)],
        "conjugate": [one, one.conj()],
        "negative": [other.imag, other.conj().imag],
        "model": model.state_dict(),
        "parameters": [model[0].weight, torch.nn.Parameter(torch.ones(2), requires_grad=False)],
        "dtypes": [torch.ones(2, 3).to(getattr(torch, name)) for name in DTYPES],
    }


def assert_as_saved(loaded, state) -> None:
    plain = state.keys() - {"parameters"}
    h.assert_same({key: loaded[key] for key in plain}, {key: state[key] for key in plain})
    weights = loaded["model"]
    assert weights["tied.weight"].data_ptr() == weights["0.weight"].data_ptr()
    assert weights._metadata == state["model"]._metadata


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


def test_a_copy_for_saving_is_of_one_moment_and_reuses_its_memory():
    state, memory = zoo(), {}
    first, weight = t.to_host(state, memory), state["again"]
    assert_as_saved(first, state)
    weight.add_(1)
    second = t.to_host(state, memory)
    assert second["again"].equal(weight)
    assert second["again"].data_ptr() == first["again"].data_ptr() != weight.data_ptr()


# ---- how it is saved


def test_saving_takes_hardly_any_memory(fork, tmp_path):
    peaks, large = [], {str(i): torch.randn(2_500_000) for i in range(40)}
    for state in ({"a": torch.randn(2_000_000)}, large):
        child = fork(program=functools.partial(t.save_checkpoint, state, tmp_path / "a.pt"))
        child.finish()
        assert child.exitcode == 0
        peaks.append(child.peak * 1024)
    assert peaks[1] - peaks[0] < 0.05 * 400e6


def limit_files(frame) -> None:
    """What is written beyond that fails; Python ignores the signal."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def test_a_failed_save_is_reported_and_never_ends_the_run(fork, options, tmp_path):
    """First there is no memory for a copy, then the disk is full."""
    copied = h.Moment("copy", where=lambda frame: frame.f_locals["memory"] is not None)
    plan = [(copied, h.fail), (h.saving("best"), limit_files)]
    schedule = "--steps 7 --save-every 3 --eval-every 7".split()
    child = fork(*options, *schedule, plan=plan, TMPDIR=str(tmp_path))
    output = child.finish()
    assert "⚠️ step_3.pt not saved: injected. Training goes on." in output
    assert "⚠️ best.pt not saved: File too large. Training goes on." in output
    assert "Final checkpoint not saved" in output and "Traceback" not in output
    assert child.exitcode == 1 and h.whole_files(tmp_path / "ck") == {"step_6.pt": 6}


def lacking(module, call: str, code: int, concerns, frame) -> None:
    """A function in the place of module.call fails where concerns(its first argument) is true."""
    real = getattr(module, call)

    def without(first, *rest):
        if concerns(first):
            raise OSError(code, os.strerror(code))
        return real(first, *rest)

    setattr(module, call, without)


def test_what_a_file_system_lacks_is_no_failed_save(fork, options, tmp_path):
    """Lustre without -o flock, NFS without lockd; FUSE; no right to list. Locks are named."""
    no_locks = functools.partial(lacking, fcntl, "lockf", errno.ENOLCK, bool)
    no_fsync = functools.partial(lacking, os, "fsync", errno.EINVAL, bool)
    no_advice = functools.partial(lacking, os, "posix_fadvise", errno.EINVAL, bool)
    no_list = functools.partial(lacking, os, "open", errno.EACCES, os.path.isdir)
    plan = [
        (h.Moment("train"), no_locks),
        (h.saving("step_2"), no_fsync),
        (h.saving("step_4"), no_advice),
        (h.saving("final"), no_list),
    ]
    # A file that is large enough to be worth advice.
    large = ["--dim", 256, "--heads", 2, "--experts", 2]
    child = fork(*options, *large, "--steps", 4, "--save-every", 2, plan=plan)
    output = child.finish()
    assert child.exitcode == 0 and "not saved" not in output, output
    assert output.count("no locks there (No locks available)") == 1
    names = ["step_4.pt", "best.pt", "final.pt"]
    assert h.whole_files(tmp_path / "ck") == dict.fromkeys(names, 4) | {"step_2.pt": 2}


# ---- what is in a directory, and which is the latest


def test_layout_keys_and_retention(finished):
    found = " ".join(sorted(path.name for path in finished.iterdir()))
    assert found == "best.pt final.pt metrics.csv run.lock step_10.pt step_12.pt"
    for path in finished.glob("*.pt"):
        state = torch.load(path, weights_only=True)
        assert {*KEYS} == {*state} and state["format_version"] == 3
    assert torch.load(finished / "final.pt", weights_only=True)["exit_reason"] == "completed"
    assert torch.load(finished / "best.pt", weights_only=True)["best"]["value"] < 6


def test_another_runs_files_are_never_overwritten(options, tmp_path):
    schedule = "--steps 4 --save-every 2 --eval-every 2".split()
    assert h.session(*options, *schedule) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "ck").glob("*.[cp]*")}
    assert h.session(*options, *schedule, "--seed", 1) == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    names = "best_2.pt final_2.pt metrics_2.csv step_2_2.pt step_4_2.pt"
    assert {*names.split()} <= {*os.listdir(tmp_path / "ck")}


def test_latest_reads_no_tensors_in_vain_and_skips_what_is_damaged_or_of_another_program(
    finished, tmp_path, monkeypatch, capfd
):
    copied = shutil.copytree(finished, tmp_path / "ck")
    (copied / "best.pt").unlink()
    h.flip_a_weight(finished / "final.pt", copied / "final.pt")
    cut = copied / "step_10.pt"
    cut.write_bytes(cut.read_bytes()[:5000])
    t.save_checkpoint({"step": 4444, "model": torch.ones(3)}, copied / "step_4444.pt")
    read = []

    def load(path, map_location="cpu", original=t.load_checkpoint, **options):
        read.append((path.name, map_location))
        return original(path, map_location, **options)

    monkeypatch.setattr(t, "load_checkpoint", load)
    assert h.session("--resume", "latest", "--checkpoint-dir", copied, "--steps", 14) == 0
    output = capfd.readouterr().out
    assert f"Skipped {cut}: damaged" in output and f"Skipped {copied}/step_4444.pt: not a" in output
    assert "final.pt: damaged" in output and "Completed Steps: 14" in output
    assert {name for name, place in read if place != "meta"} == {"final.pt", "step_12.pt"}
    assert len({name for name, place in read if place == "meta"}) == 4


# Each is saved in turn, and then the one at the end of its line is the latest.
SAVED = """
emergency_exit/emergency_step_0  new   1 0   2026-01-07 emergency_step_0
step_900                         other 1 900 2026-01-01 step_900
best                             mine  1 20  2026-01-04 best
step_30                          mine  1 30  2026-01-02 step_30
emergency_exit/emergency_step_40 mine  1 40  2026-01-03 emergency_step_40
step_25                          mine  2 25  2026-01-05 step_25
""".strip().splitlines()


def test_latest_is_the_furthest_of_the_last_session_of_the_run_that_has_saved_last(tmp_path):
    """One stopped before its first step hides no trained run; times of files say nothing."""
    for line in SAVED:
        name, run_id, session, step, saved_at, latest = line.split()
        path = tmp_path / f"{name}.pt"
        path.parent.mkdir(exist_ok=True)
        state = {"format_version": 3, "run_id": run_id, "step": int(step), "saved_at": saved_at}
        t.save_checkpoint({**state, "metrics": {"sessions": int(session)}}, path)
        os.utime(path, (2**33 - 1000 * int(step),) * 2)
        assert t.latest_checkpoint(tmp_path).stem == latest
    names = [path.stem for path, _ in t.find_checkpoints(tmp_path, print)]
    assert names == "step_25 emergency_step_40 step_30 best step_900 emergency_step_0".split()


def with_bom(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))


def torn(path: Path) -> None:
    """A power cut may leave zeros, too."""
    path.write_bytes(path.read_bytes() + b"\0\0\0\n13,1,x\n" + b"\0" * 30 + b"13,0,5.1")


def of_another(path: Path) -> None:
    path.write_text("year,rain\n1,20\n99,30\n")


# What became of metrics.csv, and where the rows are written then.
METRICS = [(with_bom, "metrics.csv"), (torn, "metrics.csv"), (of_another, "metrics_2.csv")]


@pytest.mark.parametrize("change, name", METRICS)
def test_whatever_has_become_of_metrics_csv_the_run_goes_on(finished, tmp_path, change, name):
    copied = shutil.copytree(finished, tmp_path / "ck")
    change(copied / "metrics.csv")
    assert h.session("--resume", copied / "final.pt", "--steps", "14") == 0
    *old, new = h.metrics_without_times(copied, name)
    own = name == "metrics.csv"
    assert old == (h.metrics_without_times(finished) if own else []) and new["step"] == "14"
    assert b"\0" not in (copied / name).read_bytes()
    assert own or (copied / "metrics.csv").read_text().startswith("year,rain")


# ---- what is refused


def test_what_is_damaged_or_no_checkpoint_is_refused(finished, tmp_path):
    path, whole = tmp_path / "other.pt", (finished / "final.pt").read_bytes()
    h.flip_a_weight(finished / "final.pt", path)
    assert "other.pt: damaged checkpoint (record data/" in h.refused("--resume", path)
    for content in (b"", b"hello", whole[:-300]):
        path.write_bytes(content)
        assert "other.pt: damaged, or not a checkpoint" in h.refused("--resume", path)
    assert "directory" in h.refused("--resume", tmp_path)
    assert "missing.pt: No such file" in h.refused("--resume", tmp_path / "missing.pt")


def test_the_end_of_a_large_record_and_what_a_pickle_refers_to_are_looked_at(tmp_path):
    path, large = tmp_path / "a.pt", torch.zeros(3 * 2**20)
    t.save_checkpoint({"a": large}, path)
    h.flip_a_weight(path, path, place=large.nbytes - 100)
    with pytest.raises(t.CheckpointError, match="damaged"):
        t.load_checkpoint(path)
    # Which torch.load would make, of any size.
    torch.save({"a": bytearray(9)}, path)
    with pytest.raises(t.CheckpointError, match="it refers to __builtin__.bytearray"):
        t.load_checkpoint(path)


# PyTorch would take another optimizer's state, as long as there are as many shapes that fit.
OTHERS = [
    (lambda s: s.update(format_version=2), "not a checkpoint of this program and edition"),
    (lambda s: s.update(format_version=4), "not a checkpoint of this program"),
    (lambda s: s.update(run_id="../../outside"), "not a checkpoint of this program"),
    (lambda s: s["model_state_dict"].pop("head.weight"), "does not fit"),
    (lambda s: s["data_fingerprint"].update(training=[3, None]), "the data is not what"),
    (lambda s: s["optimizer_state_dicts"]["adamw"]["param_names"][0].reverse(), "(param_names: "),
]


@pytest.mark.parametrize("change, words", OTHERS)
def test_a_checkpoint_of_another_format_or_run_is_refused(altered, tmp_path, change, words):
    path, resumed = altered(change)
    message = h.refused(*resumed)
    assert str(path) in message and words in message
    assert os.listdir(tmp_path) == ["altered.pt"]


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
        code = h.session(*altered(lambda state: state.update(change))[1])
        errors = capfd.readouterr().err
        refusal = code == 2 and errors.startswith("error: ") and errors.count("\n") == 1
        needless = key in NEEDLESS or key == "state_dicts" and value in ([], {})
        assert refusal or needless and code == 0 and not errors, (value, errors)
