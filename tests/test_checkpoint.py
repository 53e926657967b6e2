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
from campaign import Moment
from conftest import ENDLESS, ROOT, finish, refused, run, saved_path

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


@pytest.mark.parametrize("value", [
    numpy.ones(2), Path("x"), b"x", bytearray(b"x"), {(1, 2)}, collections.defaultdict(int), argparse.Namespace(a=1),
    datetime.datetime.now(), 2**2039, torch.eye(2).to_sparse(), {Path("x"): 1}, {b"x": 1}, torch.nn.Buffer(torch.ones(2)),
    [0] * t.PICKLE_OPCODES, lambda: None, torch.ones(2, device="meta"), torch.nn.Linear(1, 1)])
def test_what_could_not_be_loaded_is_not_saved(tmp_path, value):
    """Better a TypeError today than a checkpoint that is refused when it is needed."""
    path = tmp_path / "a.pt"
    t.save_checkpoint({"old": 1}, path)
    with pytest.raises(TypeError, match="would refuse|load_checkpoint"):
        t.save_checkpoint({"model": {"best": [1, value]}}, path)
    with pytest.raises(TypeError, match="not a dict"):
        t.save_checkpoint([value], path)
    assert t.load_checkpoint(path) == {"old": 1} and os.listdir(tmp_path) == ["a.pt"]


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


def test_latest_names_and_skips_what_another_program_has_saved(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "ck")
    t.save_checkpoint({"a": 1}, tmp_path / "ck" / "step_4444.pt")
    result = run("--resume", "latest", "--checkpoint-dir", tmp_path / "ck", "--steps", "14")
    assert result.returncode == 0 and "step_4444.pt: not a checkpoint of this program" in result.stdout, result.stderr
    assert "Completed Steps: 14" in result.stdout


def test_latest_prefers_the_newest_emergency_checkpoint(finished, tmp_path):
    (tmp_path / "step_10.pt").write_bytes((finished / "step_10.pt").read_bytes())
    (tmp_path / "emergency_exit").mkdir()
    newest = tmp_path / "emergency_exit" / "emergency_step_12.pt"
    newest.write_bytes((finished / "step_12.pt").read_bytes())
    assert t.latest_checkpoint(tmp_path) == newest
    os.utime(tmp_path / "step_10.pt", (2**33, 2**33))
    assert t.latest_checkpoint(tmp_path) == tmp_path / "step_10.pt"


def altered(finished, path, change):
    state = t.load_checkpoint(finished / "final.pt")
    change(state)
    torch.save(state, path)
    return path


@pytest.mark.parametrize("change, word", [
    (lambda s: s.update(format_version=2), "format 2"),
    (lambda s: s.update(format_version=torch.ones(3)), "format tensor"),
    (lambda s: s.pop("format_version"), "not a checkpoint of this program"),
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


@pytest.mark.parametrize("change", [lambda s: s["metrics"].update(file="../outside.csv"), lambda s: s["metrics"].update(file="notes.txt"),
                                    lambda s: s.update(run_id="../../outside")])
def test_a_checkpoint_from_a_stranger_cannot_choose_where_files_go(finished, tmp_path, change):
    path = altered(finished, tmp_path / "stranger.pt", change)
    assert_refused(refused("--resume", path, "--checkpoint-dir", tmp_path / "deep" / "ck", "--steps", "14"), path, "names")
    assert os.listdir(tmp_path) == ["stranger.pt"]


def test_a_metrics_file_of_another_program_is_left_alone(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "ck")
    (tmp_path / "ck" / "metrics.csv").write_text("year,rain\n1,20\n99,30\n")
    assert run("--resume", tmp_path / "ck" / "step_10.pt").returncode == 0
    assert (tmp_path / "ck" / "metrics.csv").read_text() == "year,rain\n1,20\n99,30\n"
    rows, before = [(path / name).read_text().splitlines() for path, name in ((tmp_path / "ck", "metrics_2.csv"), (finished, "metrics.csv"))]
    assert [row.split(",")[:5] for row in rows] == [row.split(",")[:5] for row in before]  # with those of the place it was saving in


def test_what_a_power_cut_made_of_the_rows_after_the_checkpoint_is_cut_off(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "ck")
    rows = (finished / "metrics.csv").read_bytes()
    (tmp_path / "ck" / "metrics.csv").write_bytes(rows + b"\0\0\0\0\n13,1,x\n" + b"\0" * 30)
    assert run("--resume", "latest", "--checkpoint-dir", tmp_path / "ck", "--steps", "14").returncode == 0
    assert (tmp_path / "ck" / "metrics.csv").read_bytes().startswith(rows)
    assert b"\0" not in (tmp_path / "ck" / "metrics.csv").read_bytes()


def test_only_the_end_of_a_long_metrics_file_is_read():
    class Text(bytes):
        lowest = 10**9

        def __getitem__(self, part):
            self.lowest = min(self.lowest, part.start)
            return super().__getitem__(part)

        def rfind(self, what, start, end):
            position = super().rfind(what, start, end)
            self.lowest = min(self.lowest, position)
            return position

    header = b"step,loss\n"
    text = Text(header + b"".join(b"%d,0.5\n" % step for step in range(10, 10_010, 10)))
    end = t.end_of_rows(text, len(header), 9_984)
    assert bytes(text).startswith(b"9980,0.5\n9990,", end - len(b"9980,0.5\n"))
    assert text.lowest > len(text) - 60
    assert t.end_of_rows(text, len(header), 9) == len(header)


def test_resuming_latest_reads_the_checkpoint_once(finished, monkeypatch):
    loaded = []
    monkeypatch.setattr(t, "opened_checkpoint", lambda path, opened=t.opened_checkpoint: loaded.append(path) or opened(path))
    path, state = t.checkpoint_to_resume("latest", str(finished), t.Processes(None), print)
    assert loaded == [path] and state["step"] == 12


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


def test_a_device_or_a_pipe_is_never_replaced(tmp_path):
    """As root, saving to /dev/null would leave a machine without it."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError, match="must not replace"):
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
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
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
    shutil.copy(finished / "final.pt", fallback / "emergency_step_13_of_a_run.pt")
    assert t.latest_checkpoint(tmp_path / "ck").parent == fallback
    if os.getuid() == 0:
        os.chown(fallback, 65534, 65534)
        assert t.latest_checkpoint(tmp_path / "ck").parent == tmp_path / "ck"


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


def test_best_weights_that_could_not_be_saved_are_saved_once_there_is_room(tmp_path):
    """The next evaluation may be worse: the copy in memory is the only one."""
    said, room = [], False

    def save(state, name):
        if not room:
            raise OSError(28, "No space left on device")
        t.save_checkpoint(state, tmp_path / name)
        return tmp_path / name

    weights = torch.ones(2)
    writer = t.CheckpointWriter(save, said.append)
    writer.submit({"a": weights}, {"best": "best.pt", "periodic": "step_1.pt"})
    for step in (2, 3):
        weights += 1
        writer.submit({"a": weights}, {"periodic": f"step_{step}.pt"})
    writer.wait()
    assert said == [f"⚠️ {name}.pt not saved: No space left on device. Training goes on." for name in ("best", "step_1", "step_2", "step_3")]
    room = True
    writer.submit({"a": weights}, {"periodic": "step_4.pt"})
    writer.wait()
    assert said[4:] == [f"✅ Saved after all: {tmp_path}/best.pt"]
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "step_4.pt"]
    best = t.load_checkpoint(tmp_path / "best.pt")
    assert best["a"].tolist() == [1, 1] and best["exit_reason"] == "best"
    assert t.load_checkpoint(tmp_path / "step_4.pt")["a"].tolist() == [3, 3]
    writer.close()


def test_a_better_best_replaces_one_that_could_not_be_saved(tmp_path):
    refusals = [OSError(28, "No space left on device")] * 2

    def save(state, name):
        if refusals:
            raise refusals.pop()
        t.save_checkpoint(state, tmp_path / name)

    writer = t.CheckpointWriter(save, str)
    for value in (1, 2, 3):
        writer.submit({"a": value}, {"best": "best.pt"} if value < 3 else {"periodic": "step_3.pt"})
    writer.wait()
    writer.close()
    assert t.load_checkpoint(tmp_path / "best.pt")["a"] == 2


def test_a_copy_that_does_not_fit_into_memory_never_ends_the_run(tmp_path, monkeypatch):
    said = []

    def save(state, name):
        t.raise_if_error(state)
        t.save_checkpoint(state, tmp_path / name)

    writer = t.CheckpointWriter(save, said.append)
    monkeypatch.setattr(t, "host_copy", lambda state, kept: torch.empty(2**60))
    writer.submit({}, {"periodic": "step_1.pt"})
    writer.wait()
    monkeypatch.undo()
    writer.submit({"a": 1}, {"periodic": "step_2.pt"})
    writer.close()
    assert len(said) == 1 and said[0].startswith("⚠️ step_1.pt not saved: ") and said[0].endswith("Training goes on.")
    assert os.listdir(tmp_path) == ["step_2.pt"]


def test_rows_are_written_whole_while_a_save_flushes_them(tmp_path):
    metrics = t.Metrics(tmp_path / "metrics.csv", ["adamw"], 0)
    done = threading.Event()

    def flush() -> None:
        while not done.is_set():
            metrics.flush()

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    for step in range(1, 20_001):
        metrics.row(f"{step},0,1.5")
    done.set()
    thread.join()
    metrics.close()
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1:] == [f"{step},0,1.5" for step in range(1, 20_001)]


def test_a_deleted_directory_is_made_again_with_its_lock_and_all_rows(spawn, options, tmp_path):
    directory = tmp_path / "ck"
    child = spawn(*options, *ENDLESS, "--log-every", 1)
    child.expect(r"step \d+/")
    shutil.rmtree(directory)
    child.sendline("s")
    child.expect("Checkpoint saved: ")
    second = run(*options, "--steps", 1)
    assert second.returncode == 2 and f"pid {child.pid} " in second.stderr
    child.sendline("q")
    state = t.load_checkpoint(saved_path(finish(child)))
    steps = [int(line.partition(",")[0]) for line in (directory / "metrics.csv").read_text().splitlines()[1:]]
    assert child.exitstatus == 0 and steps == list(range(1, state["step"] + 1))
    assert (directory / "run.lock").read_text().startswith(f"{child.pid} ")


def test_a_directory_that_was_deleted_and_is_another_runs_by_now_gets_no_file_of_ours(spawn, options, tmp_path):
    child = spawn(*options, *ENDLESS)
    child.expect(r"step \d+/")
    shutil.rmtree(tmp_path / "ck")
    second = spawn(*options, *ENDLESS)
    second.expect(r"step \d+/")
    for _ in range(2):
        child.sendline("s")
        child.expect(f"not saved: .*in use by another run .pid {second.pid} ")
    child.sendline("q")
    child.expect("Training goes on")
    second.sendline("q")
    finish(second)
    child.sendline("q")
    assert saved_path(finish(child)).is_file() and child.exitstatus == 0


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


def test_a_file_system_that_does_not_flush_directories_is_no_failed_save(fork, options, tmp_path):
    def no_directories(frame) -> None:
        def fsync(fd, fsync=os.fsync):
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            fsync(fd)

        os.fsync = fsync

    child = fork(*options, "--steps", 4, "--save-every", 2, plan=[(Moment("train"), no_directories)])
    output = child.finish()
    assert child.exitcode == 0 and "not saved" not in output
    assert t.load_checkpoint(tmp_path / "ck" / "final.pt")["step"] == 4


def test_a_checkpoint_of_another_pytorch_loads_as_far_as_pytorch_takes_it(finished, tmp_path):
    """A newer one has added an option to AdamW's groups."""
    path = altered(finished, tmp_path / "older.pt", lambda s: (
        s["optimizer_state_dicts"]["adamw"]["param_groups"][0].pop("decoupled_weight_decay"), s.update(torch_version="2.6.0")))
    result = run("--resume", path, "--checkpoint-dir", tmp_path / "ck", "--steps", "14")
    assert result.returncode == 0 and "Completed Steps: 14" in result.stdout, result.stderr


@pytest.mark.parametrize("change, words", [
    (lambda o: o.update({"class": "torch.optim.sgd.SGD"}), "optimizer adamw is torch.optim.sgd.SGD, but here torch.optim.adamw.AdamW"),
    (lambda o: o["param_names"][0].reverse(), "parameter 0 of group 0 of optimizer adamw is head.weight, but here token.weight"),
    (lambda o: o["param_names"][0].pop(), "of optimizer adamw is not there, but here head.weight"),
])
def test_an_optimizers_state_only_goes_to_the_same_optimizer_over_the_same_parameters(finished, tmp_path, change, words):
    """PyTorch would take it, shapes and all, as long as there are as many."""
    path = altered(finished, tmp_path / "other.pt", lambda s: change(s["optimizer_state_dicts"]["adamw"]))
    assert_refused(refused("--resume", path, "--checkpoint-dir", tmp_path / "ck", "--steps", "14"), "does not fit this run", words)
