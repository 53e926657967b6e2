"""Checkpoints: atomic, damaged, hostile, kept, locked."""

import argparse
import collections
import datetime
import errno
import os
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
from campaign import Moment, forked
from conftest import (
    ENDLESS,
    ROOT,
    finish,
    metrics_without_times,
    refused,
    run,
    saved_path,
    session,
)

import train_graceful as t

KEYS = {"format_version", "model_state_dict", "optimizer_state_dicts", "scheduler_state_dicts", "state_dicts", "step", "best",
        "evaluation", "metrics", "config", "data_fingerprint", "exit_reason", "torch_version", "run_id", "saved_at"}


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


@pytest.mark.parametrize("value", [
    numpy.ones(2), Path("x"), b"x", bytearray(b"x"), {(1, 2)}, collections.defaultdict(int), argparse.Namespace(a=1),
    datetime.datetime.now(), 2**2039, torch.eye(2).to_sparse(), {Path("x"): 1}, {b"x": 1}, torch.nn.Buffer(torch.ones(2)),
    lambda: None, torch.ones(2, device="meta"), torch.nn.Linear(1, 1)])
def test_what_could_not_be_loaded_is_not_saved(tmp_path, value):
    """Better a TypeError today than a checkpoint that is refused when it is needed."""
    path = tmp_path / "a.pt"
    t.save_checkpoint({"old": 1}, path)
    with pytest.raises(TypeError, match="can be saved|2,000 bits"):
        t.save_checkpoint({"model": {"best": [1, value]}}, path)
    with pytest.raises(TypeError, match="not a dict"):
        t.save_checkpoint([value], path)
    assert t.load_checkpoint(path) == {"old": 1} and os.listdir(tmp_path) == ["a.pt"]


def test_a_state_with_more_beside_its_tensors_than_is_read_again_is_not_saved(tmp_path):
    path = tmp_path / "a.pt"
    t.save_checkpoint({"old": 1}, path)
    with pytest.raises(RuntimeError, match="the state holds more than 32 MiB of values beside its tensors"):
        t.save_checkpoint({"text": "x" * t.PICKLE_BYTES}, path)
    assert t.load_checkpoint(path) == {"old": 1} and os.listdir(tmp_path) == ["a.pt"]
    torch.save({"text": "x" * t.PICKLE_BYTES}, tmp_path / "b.pt")
    with pytest.raises(t.CheckpointError, match="more than 32 MiB"):
        t.load_checkpoint(tmp_path / "b.pt")


def test_layout_keys_and_retention(finished):
    assert sorted(path.name for path in finished.iterdir()) == ["best.pt", "final.pt", "metrics.csv", "run.lock", "step_10.pt", "step_12.pt"]
    for path in finished.glob("*.pt"):
        state = torch.load(path, weights_only=True)
        assert KEYS == set(state) and state["format_version"] == 2
    assert torch.load(finished / "final.pt", weights_only=True)["exit_reason"] == "completed"
    assert torch.load(finished / "best.pt", weights_only=True)["best"]["value"] < 6


def test_weights_load_elsewhere_without_this_program(finished):
    code = f"import torch; print(torch.load({str(finished / 'final.pt')!r}, weights_only=True)['model_state_dict']['head.weight'].shape)"
    result = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert result.stdout == "torch.Size([256, 16])\n"


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


def test_latest_passes_over_what_another_program_has_saved(finished, tmp_path, capfd):
    shutil.copytree(finished, tmp_path / "ck")
    t.save_checkpoint({"step": 4444, "model": torch.ones(3)}, tmp_path / "ck" / "step_4444.pt")
    assert session("--resume", "latest", "--checkpoint-dir", tmp_path / "ck", "--steps", "14") == 0
    assert "Completed Steps: 14" in capfd.readouterr().out


def saved_by(path, run_id, session, step, saved_at) -> Path:
    """A file that `latest` takes for a checkpoint; its modification time says nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    t.save_checkpoint({"run_id": run_id, "step": step, "saved_at": saved_at, "metrics": {"sessions": session}}, path)
    os.utime(path, (2**33 - 1000 * step,) * 2)
    return path


def test_latest_is_the_furthest_of_the_run_that_has_saved_last(tmp_path):
    saved_by(tmp_path / "step_900.pt", "other", 1, 900, "2026-01-01")
    saved_by(tmp_path / "best.pt", "mine", 1, 20, "2026-01-04")
    saved_by(tmp_path / "step_30.pt", "mine", 1, 30, "2026-01-02")
    furthest = saved_by(tmp_path / "emergency_exit" / "emergency_step_40.pt", "mine", 1, 40, "2026-01-03")
    assert t.latest_checkpoint(tmp_path) == furthest
    again = saved_by(tmp_path / "step_25.pt", "mine", 2, 25, "2026-01-05")
    assert t.latest_checkpoint(tmp_path) == again, "it was resumed from an older one on purpose, and goes on from there"


def test_a_start_that_was_stopped_before_its_first_step_hides_no_trained_run(tmp_path):
    trained = saved_by(tmp_path / "step_30.pt", "mine", 1, 30, "2026-01-01")
    stopped = saved_by(tmp_path / "emergency_exit" / "emergency_step_0.pt", "new", 1, 0, "2026-01-02")
    assert t.latest_checkpoint(tmp_path) == trained
    trained.unlink()
    assert t.latest_checkpoint(tmp_path) == stopped


def altered(finished, path, change):
    state = t.load_checkpoint(finished / "final.pt")
    change(state)
    torch.save(state, path)
    return path


@pytest.mark.parametrize("change, word", [
    (lambda s: s.update(format_version=1), "format_version"),
    (lambda s: s.update(format_version=3), "not a checkpoint of this program"),
    (lambda s: s.update(format_version=torch.ones(3)), "not a checkpoint of this program"),
    (lambda s: s.pop("format_version"), "not a checkpoint of this program"),
    (lambda s: s.update(step="12"), "step"),
    (lambda s: s["metrics"].pop("sums"), "metrics"),
    (lambda s: s["config"].update(dim="wide"), "dim"),
    (lambda s: s["config"].update(dim=32), "does not fit"),
    (lambda s: s["config"].update(speed=1), "of another program, which has --speed"),
    (lambda s: s["model_state_dict"].pop("head.weight"), "does not fit"),
    (lambda s: s["optimizer_state_dicts"].pop("adamw"), "kept by this run, but not in the checkpoint"),
    (lambda s: s["state_dicts"].update(ema={}), "ema is in the checkpoint, but not kept by this run"),
    (lambda s: s.update(data_fingerprint="0" * 32), "data"),
    (lambda s: s["data_fingerprint"].update(training=[3, None]), "training data"),
    (lambda s: s.update(run_id="../../outside"), "not a checkpoint of this program"),
])
def test_a_checkpoint_of_another_format_or_size_is_refused(finished, tmp_path, change, word):
    path = altered(finished, tmp_path / "other.pt", change)
    assert_refused(refused("--resume", path, "--checkpoint-dir", tmp_path / "ck", "--steps", "14"), path, word)
    assert os.listdir(tmp_path) == ["other.pt"]


STRANGE = [None, True, 10**30, "x", float("nan"), [], [1], {}, {1: 2}, torch.ones(2), {"a": None}]


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("key", sorted(KEYS))
def test_whatever_stands_in_the_place_of_a_value_is_one_line(finished, tmp_path, key, capfd):
    """A traceback would be a bug; what no run needs to go on may be anything."""
    for value in STRANGE:
        path = altered(finished, tmp_path / "strange.pt", lambda s: s.update({key: value}))
        code = session("--resume", path, "--checkpoint-dir", tmp_path / "ck", "--steps", "13")
        errors = capfd.readouterr().err
        assert code == 0 and not errors or code == 2 and errors.startswith("error: ") and errors.count("\n") == 1, (value, errors)
        needless = key in ("exit_reason", "torch_version", "saved_at") or key == "state_dicts" and value in ([], {})
        assert code == 2 or needless or key == "step" and value in (True, 10**30), value


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("place", ["config", "optimizer_state_dicts", "scheduler_state_dicts"])
def test_whatever_stands_in_the_place_of_a_value_inside_is_one_line(finished, tmp_path, place, capfd):
    state = t.load_checkpoint(finished / "final.pt")
    for key in state[place].keys() - {"data"}:
        for value in [10**30, "x", float("nan")] if place == "config" else STRANGE:
            torch.save({**state, place: {**state[place], key: value}}, tmp_path / "strange.pt")
            code = session("--resume", tmp_path / "strange.pt", "--checkpoint-dir", tmp_path / "ck", "--steps", "12")
            errors = capfd.readouterr().err
            assert code == 0 and not errors or code == 2 and errors.startswith("error: ") and errors.count("\n") == 1, (key, value, errors)


def test_a_metrics_file_of_another_program_is_left_alone(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "ck")
    (tmp_path / "ck" / "metrics.csv").write_text("year,rain\n1,20\n99,30\n")
    assert session("--resume", tmp_path / "ck" / "step_10.pt") == 0
    assert (tmp_path / "ck" / "metrics.csv").read_text() == "year,rain\n1,20\n99,30\n"
    own = metrics_without_times(tmp_path / "ck", "metrics_2.csv")
    assert own and own == metrics_without_times(finished)[-len(own):]


@pytest.mark.parametrize("tail", [b"\0\0\0\0\n13,1,x\n" + b"\0" * 30, b"13,0,5.1"], ids=["zeros", "torn"])
def test_what_a_power_cut_made_of_the_rows_after_the_checkpoint_is_cut_off(finished, tmp_path, tail):
    shutil.copytree(finished, tmp_path / "ck")
    rows = (finished / "metrics.csv").read_bytes()
    (tmp_path / "ck" / "metrics.csv").write_bytes(rows + tail)
    assert session("--resume", "latest", "--checkpoint-dir", tmp_path / "ck", "--steps", "14") == 0
    assert (tmp_path / "ck" / "metrics.csv").read_bytes().startswith(rows)
    text = (tmp_path / "ck" / "metrics.csv").read_bytes()
    assert b"\0" not in text and [row["step"] for row in metrics_without_times(tmp_path / "ck")][-2:] == ["12", "14"]


def test_latest_reads_the_tensors_of_one_checkpoint_alone(finished, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(t, "load_checkpoint", lambda path, load=t.load_checkpoint: loaded.append(path) or load(path))
    shutil.copytree(finished, tmp_path / "ck")
    assert session("--resume", "latest", "--checkpoint-dir", tmp_path / "ck") == 0
    assert loaded == [tmp_path / "ck" / "step_12.pt"] or loaded == [tmp_path / "ck" / "final.pt"]


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


def test_another_runs_files_are_never_overwritten(options, tmp_path, capfd):
    schedule = ["--steps", "4", "--save-every", "2", "--eval-every", "2"]
    assert session(*options, *schedule) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "ck").iterdir() if path.name != "run.lock"}
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
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"] and stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


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


def test_a_fallback_folder_of_somebody_else_is_not_trusted(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    fallback = t.fallback_directory(tmp_path / "ck")
    shutil.copytree(finished, tmp_path / "ck")
    fallback.mkdir(parents=True)
    altered(finished, fallback / "emergency_step_13_of_a_run.pt", lambda s: s.update(step=13, saved_at="9"))
    assert t.latest_checkpoint(tmp_path / "ck").parent == fallback
    if os.getuid() == 0:
        os.chown(fallback, 65534, 65534)
        assert t.latest_checkpoint(tmp_path / "ck").parent == tmp_path / "ck"


FULL_BEFORE_TRAINING = """
import resource, train_graceful as t
def loop(*arguments, original=t.standard_training_loop):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    original(*arguments)
t.standard_training_loop = loop
t.main(t.train, **t.OPTIONS)
"""


def test_a_failed_periodic_save_is_reported_and_never_ends_the_run(options, tmp_path):
    result = forked([sys.executable, "-c", FULL_BEFORE_TRAINING, *options, "--steps", "20", "--save-every", "8",
                             "--eval-every", "12"], cwd=ROOT,
                            stdin=subprocess.DEVNULL, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert "⚠️ step_8.pt not saved: File too large. Training goes on." in result.stdout
    assert "⚠️ best.pt not saved: File too large. Training goes on." in result.stdout
    assert "step_16.pt not saved" in result.stdout and "Final checkpoint not saved" in result.stdout
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert not list((tmp_path / "ck").glob("*.pt"))


def test_a_copy_that_does_not_fit_into_memory_never_ends_the_run(options, tmp_path, monkeypatch, capfd):
    copies = []

    def host_copy(parts, kept, original=t.host_copy):
        copies.append(len(parts))
        return torch.empty(2**60) if len(copies) == 1 else original(parts, kept)

    monkeypatch.setattr(t, "host_copy", host_copy)
    assert session(*options, "--steps", 6, "--save-every", 2, "--eval-every", 100, "--keep", 9) == 0
    output = capfd.readouterr().out
    assert output.count("not saved") == 1 and "⚠️ step_2.pt not saved: " in output
    assert {path.name for path in (tmp_path / "ck").glob("*.pt")} == {"step_4.pt", "step_6.pt", "final.pt", "best.pt"}


def test_rows_are_written_whole_while_a_save_flushes_them(tmp_path):
    metrics = t.Metrics(tmp_path, "0123456789ab", 0, tmp_path)
    done = threading.Event()

    def flush() -> None:
        while not done.is_set():
            metrics.flush()

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    for step in range(1, 20_001):
        metrics.row({"step": step, "loss": 1.5})
    done.set()
    thread.join()
    rows = [f"{step},1.5,0123456789ab" for step in range(1, 20_001)]
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,loss,run", *rows]


def test_a_directory_that_is_deleted_under_a_run_costs_no_save(spawn, options, tmp_path):
    child = spawn(*options, *ENDLESS)
    child.expect(r"step \d+/")
    shutil.rmtree(tmp_path / "ck")
    child.sendline("s")
    child.expect("Checkpoint saved: ")
    assert f"in use by another run (pid {child.pid} on " in refused(*options), "the lock is there again"
    child.sendline("q")
    path = saved_path(finish(child))
    assert child.exitstatus == 0 and path.parent == tmp_path / "ck" / "emergency_exit" and t.load_checkpoint(path)["step"]


def test_a_directory_that_another_run_has_taken_since_it_was_deleted_is_not_saved_into(spawn, options, tmp_path):
    first = spawn(*options, *ENDLESS)
    first.expect(r"step \d+/")
    shutil.rmtree(tmp_path / "ck")
    second = spawn(*options, *ENDLESS)
    second.expect(r"step \d+/")
    first.sendline("q")
    first.expect(f"not saved: in use by another run .pid {second.pid} on .*Training goes on")
    second.sendline("q")
    assert saved_path(finish(second)).exists() and second.exitstatus == 0
    first.sendline("q")
    assert saved_path(finish(first)).exists() and first.exitstatus == 0
    assert len(list((tmp_path / "ck" / "emergency_exit").glob("*.pt"))) == 2


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_named_in_one_line(fork, options, tmp_path, code):
    """Lustre without -o flock, NFS without lockd."""
    def no_locks(frame) -> None:
        def lockf(*arguments):
            raise OSError(code, os.strerror(code))

        frame.f_globals["fcntl"].lockf = lockf

    child = fork(*options, "--steps", 4, plan=[(Moment("train"), no_locks)])
    output = child.finish()
    assert child.exitcode == 0 and output.count("no locks there") == 1 and f"({os.strerror(code)})" in output
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
    child = fork(*options, "--steps", 4, "--save-every", 2, plan=[(Moment("train"), lacking(*LACKING[what]))])
    output = child.finish()
    assert child.exitcode == 0 and "not saved" not in output, output
    assert t.load_checkpoint(tmp_path / "ck" / "final.pt")["step"] == 4
    assert not list((tmp_path / "ck").rglob("*.tmp"))


def with_bom(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("change, name", [(with_bom, "metrics.csv"), (piped, "metrics_2.csv"), (Path.unlink, "metrics.csv")])
def test_whatever_a_person_has_made_of_metrics_csv_the_run_goes_on(finished, tmp_path, change, name):
    """A spreadsheet has saved it, as spreadsheets do; a pipe stands in its place; it is gone."""
    directory = shutil.copytree(finished, tmp_path / "ck")
    steps = [row["step"] for row in metrics_without_times(directory)]
    change(directory / "metrics.csv")
    assert session("--resume", directory / "final.pt", "--steps", "14") == 0
    now = [row["step"] for row in metrics_without_times(directory, name)]
    assert now == [*(steps if change is with_bom else []), "14"]


def test_a_checkpoint_of_another_pytorch_loads_as_far_as_pytorch_takes_it(finished, tmp_path, capfd):
    """A newer one has added an option to AdamW's groups."""
    path = altered(finished, tmp_path / "older.pt", lambda s: (
        s["optimizer_state_dicts"]["adamw"]["param_groups"][0].pop("decoupled_weight_decay"), s.update(torch_version="2.6.0")))
    assert session("--resume", path, "--checkpoint-dir", tmp_path / "ck", "--steps", "14") == 0
    assert "Completed Steps: 14" in capfd.readouterr().out


@pytest.mark.parametrize("change, words", [
    (lambda o: o.update({"class": "torch.optim.sgd.SGD"}), "does not fit adamw (torch.optim.sgd.SGD there, AdamW here)"),
    (lambda o: o["param_names"][0].reverse(), "over other parameters: model.head.weight there, model.token.weight here"),
    (lambda o: o["param_names"][0].pop(), "does not fit adamw (over other parameters"),
])
def test_an_optimizers_state_only_goes_to_the_same_optimizer_over_the_same_parameters(finished, tmp_path, change, words):
    """PyTorch would take it, shapes and all, as long as there are as many."""
    path = altered(finished, tmp_path / "other.pt", lambda s: change(s["optimizer_state_dicts"]["adamw"]))
    assert_refused(refused("--resume", path, "--checkpoint-dir", tmp_path / "ck", "--steps", "14"), "does not fit", words)
