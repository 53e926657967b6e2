"""--shard: every rank has a part of the model and saves it; a directory is a checkpoint, whole or not there."""

import errno
import itertools
import os
import pickle
import re
import shutil
import signal

import pytest
import torch
from campaign import Campaign, Moment, ask_to_leave
from conftest import ENDLESS, MODES, SCRIPT, finish, refused, run, wait_until
from test_faults_saves import needs_strace, trace
from test_faults_stops import fail
from test_many_processes import (  # noqa: F401 (fixtures)
    OPTIONS, STEPS, alive, assert_close_end, assert_torchrun_restarts_from_the_last_save, data, finished, float32_muon, group, torchrun, worker_pids)
from test_resume import STATE_KEYS, assert_same, metrics_without_times

import train_graceful as t


@pytest.fixture
def sharded(group, data):  # noqa: F811
    """sharded(size, directory, *options) starts that many ranks; without options of its own a new run."""
    def start(size: int, directory, *options: object, plans: dict = {}):
        return group(size, "--checkpoint-dir", directory, *(options or [*OPTIONS, "--data", data, "--shard"]), plans=plans)

    return start


def new(data, mode: str = "geometric", *options: object) -> list:  # noqa: F811
    return [*OPTIONS, *MODES[mode], "--data", data, "--shard", *options]


def saved_directory(output: str):
    return t.Path(re.search(r"checkpoint saved: (\S+)", output)[1])


def assert_same_end(directory, reference) -> None:
    a, b = t.load_checkpoint(directory / "final"), t.load_checkpoint(reference / "final")
    assert_same({key: a[key] for key in STATE_KEYS}, {key: b[key] for key in STATE_KEYS})
    assert metrics_without_times(directory) == metrics_without_times(reference)


def whole_directories(directory) -> dict[str, int]:
    """The step of each checkpoint under a final name; every one of them passes its check."""
    found = [path for folder in (directory, directory / "emergency_exit") if folder.exists() for path in folder.iterdir()]
    return {path.name: t.load_checkpoint(path)["step"] for path in found
            if path.is_dir() and not path.name.startswith(".") and path.name != "emergency_exit"}


def one_file(directory) -> None:
    """final becomes final.pt, for comparisons with runs that are not sharded."""
    t.convert_checkpoint(directory / "final", directory / "final.pt")


# ---- the same run, however many have a part of it


@pytest.mark.parametrize("mode", ["standard", "geometric"])
def test_two_and_four_parts_train_the_model_of_one_process(sharded, group, float32_muon, data, tmp_path, mode):  # noqa: F811
    finished(group(1, *OPTIONS, *MODES[mode], "--data", data, "--checkpoint-dir", tmp_path / "1"))
    for size in (2, 4):
        directory = tmp_path / str(size)
        texts, codes = finished(sharded(size, directory, *new(data, mode)))
        assert codes == [0] * size and "All steps done" in texts[0] and texts[1:] == [""] * (size - 1), texts
        assert {path.name for path in directory.iterdir()} == {"best", "final", "metrics.csv", "run.lock", "step_3", "step_6"}
        assert len(list((directory / "final").glob("*.distcp"))) == size
        one_file(directory)
        assert_close_end(directory, tmp_path / "1")
    a, b = (t.load_checkpoint(tmp_path / size / "final.pt") for size in ("1", "2"))
    assert list(a) == list(b)  # one format
    t.check_like(b["optimizer_state_dicts"], a["optimizer_state_dicts"], "optimizers")
    t.check_like(b["model_state_dict"], a["model_state_dict"], "model")


@pytest.mark.parametrize("mode, size", [("standard", 2), ("geometric", 4),
                                        pytest.param("controller", 2, marks=pytest.mark.campaign), pytest.param("geometric", 2, marks=pytest.mark.campaign)])
def test_stopped_by_any_rank_and_resumed_is_the_same_run(sharded, data, tmp_path, mode, size):  # noqa: F811
    options = new(data, mode, "--dropout", 0.1)
    finished(sharded(size, tmp_path / "whole", *options))
    directory = tmp_path / "stopped"
    for rank, signum, moment in [(size - 1, signal.SIGTERM, Moment("forward_backward", 3)), (0, signal.SIGUSR1, Moment("evaluate"))]:
        stop = (moment, lambda frame, signum=signum: os.kill(os.getpid(), signum))
        texts, codes = finished(sharded(size, directory, *options, plans={rank: [stop]}))
        assert codes == [128 + signum] * size and texts[0].count("Exit requested") == 1, texts
        state = t.load_checkpoint(saved_directory(texts[0]))
        assert state["exit_reason"] == f"signal_{signum.name}" and 1 <= state["step"] < STEPS
        options = ["--resume", "latest"]
    texts, codes = finished(sharded(size, directory, *options))
    assert codes == [0] * size, texts
    assert_same_end(directory, tmp_path / "whole")


def test_a_run_goes_on_with_any_number_of_parts_and_as_one_file(sharded, group, float32_muon, data, tmp_path):  # noqa: F811
    finished(group(1, *OPTIONS, *MODES["geometric"], "--data", data, "--steps", 16, "--checkpoint-dir", tmp_path / "whole"))
    directory, arguments = tmp_path / "moved", new(data, "geometric", "--steps", 16)
    stop = (Moment("batch_done", event="return"), lambda frame: os.kill(os.getpid(), signal.SIGTERM))
    for size in (1, 2, 4):
        texts, codes = finished(sharded(size, directory, *arguments, plans={0: [stop]}))
        assert codes == [143] * size, texts
        arguments = ["--resume", "latest"]
    newest = saved_directory(texts[0])
    converted = run("--convert", newest, directory / "one.pt")
    assert converted.returncode == 0 and converted.stdout == f"✅ Converted: {directory}/one.pt\n", converted.stderr
    texts, codes = finished(group(1, "--resume", directory / "one.pt", "--checkpoint-dir", directory))
    assert codes == [0]
    assert_close_end(directory, tmp_path / "whole")


def test_one_file_becomes_parts_and_they_one_file_again(group, sharded, data, tmp_path):  # noqa: F811
    finished(group(2, *OPTIONS, *MODES["geometric"], "--data", data, "--checkpoint-dir", tmp_path / "ck"))
    before = t.load_checkpoint(tmp_path / "ck" / "step_6.pt")
    for source, target in [("step_6.pt", "parts"), ("parts", "again.pt")]:
        t.convert_checkpoint(tmp_path / "ck" / source, tmp_path / "ck" / target)
    after = t.load_checkpoint(tmp_path / "ck" / "again.pt")
    ages = [path.stat().st_mtime_ns for path in (tmp_path / "ck" / "step_6.pt", tmp_path / "ck" / "parts" / "state.pt", tmp_path / "ck" / "again.pt")]
    assert ages[0] == ages[1] == ages[2]
    assert_same(before, after)
    texts, codes = finished(sharded(2, tmp_path / "ck", "--resume", tmp_path / "ck" / "parts"))
    assert codes == [0, 0] and "Resumed at step 6" in texts[0]
    assert t.load_checkpoint(tmp_path / "ck" / "final")["step"] == STEPS
    for source, target, message in [("step_6.pt", "parts", "is there already"), ("none.pt", "new", "No such file"), ("metrics.csv", "new", "damaged, or not"),
                                    ("emergency", "new", "No such file"), ("step_6.pt", "new.pt", "becomes a directory"), ("parts", "new", "becomes one file"), (".", "new", "a directory without state.pt")]:
        with pytest.raises(t.UserError, match=message):
            t.convert_checkpoint(tmp_path / "ck" / source, tmp_path / "ck" / target)
    result = run("--convert", tmp_path / "ck" / "step_6.pt", tmp_path / "ck" / "parts")
    assert result.returncode == 2 and result.stderr == f"error: {tmp_path}/ck/parts is there already\n"
    assert not (tmp_path / "ck" / "new").exists()


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_ctrl_c_ends_a_conversion_and_leaves_nothing(parts, fork, tmp_path, kind):
    source, target = parts / "step_6", tmp_path / "new.pt"
    if kind == "file":
        target = tmp_path / "new"
        t.convert_checkpoint(source, source := tmp_path / "one.pt")
    before = sorted(tmp_path.rglob("*"))
    child = fork("--convert", source, target, plan=[(Moment("flush_to_disk", file="train_graceful.py"), None)])
    child.paused()
    child.terminal.send("\x03")
    child.go()
    child.finish()
    assert child.exitcode == 130 and sorted(tmp_path.rglob("*")) == before


def test_no_rank_has_the_whole_model(sharded, data, tmp_path):  # noqa: F811
    """Peak memory while it starts, trains, evaluates, saves and resumes: of the state, each of four has its quarter."""
    def peaks(size: int, name: str, *options: object) -> int:
        ranks = sharded(size, tmp_path / name, *options)
        _, codes = finished(ranks)
        assert codes == [0] * size
        return max(rank.peak for rank in ranks) * 1024

    wide = ["--dim", 256, "--heads", 4, "--layers", 6, "--steps", 2, "--save-every", 1, "--eval-every", 2, "--log-every", 2]
    weights = 4 * 6 * 12 * 256**2  # bytes; as much for their gradients, more for momentum, moments and the copy that is saved
    small = peaks(1, "small", *new(data, "geometric", *wide[6:]))
    for options in (new(data, "geometric", *wide), ["--resume", tmp_path / "1" / "step_1"]):
        one, four = (peaks(size, str(size), *options) - small for size in (1, 4))
        assert one > 3 * weights and four < one / 2, (one, four, weights)


# ---- stops and saves


def test_training_goes_on_while_parts_are_written_until_leaving_waits_for_them(sharded, data, tmp_path):  # noqa: F811
    ranks = sharded(2, tmp_path, *new(data, "standard", *ENDLESS), plans={1: [(Moment("write_part"), None)]})
    ranks[0].terminal.expect(r"step \d+/")
    ranks[0].terminal.send("s\n")
    ranks[1].paused()
    begun = len(metrics_without_times(tmp_path))
    wait_until(lambda: len(metrics_without_times(tmp_path)) > begun + 20)
    assert not list(tmp_path.glob("step_*"))
    ranks[0].terminal.send("q\n")
    ranks[0].terminal.expect("saving [1-9][0-9.]* kB of about [0-9.]+ kB")
    ranks[1].go()
    ranks[0].terminal.expect("Checkpoint saved: ")
    texts, codes = finished(ranks)
    assert codes == [0, 0] and len(list(tmp_path.glob("step_*"))) == 1
    assert t.load_checkpoint(saved_directory(texts[0]))["exit_reason"] == "user_requested_graceful_exit"


@pytest.mark.parametrize("where", ["write_part", "publish_parts", "evaluate"])
def test_a_request_in_the_middle_of_a_save_or_an_evaluation(sharded, data, tmp_path, where):  # noqa: F811
    plan = [(Moment(where, 1 if where == "evaluate" else 2), None)]
    ranks = sharded(2, tmp_path, *new(data), plans={0: plan})
    ranks[0].paused()
    ranks[1].kill(signal.SIGTERM)
    ranks[0].kill(signal.SIGTERM)
    ranks[0].terminal.expect("Exit requested")
    ranks[0].go()
    texts, codes = finished(ranks)
    assert codes == [143, 143], texts
    assert "Emergency checkpoint saved" in texts[0]
    assert whole_directories(tmp_path) and not list(tmp_path.rglob(".*tmp"))


@pytest.mark.parametrize("full", [0, 1])
@pytest.mark.parametrize("function", ["write_part", "publish_parts", "_take_copy"])
def test_a_disk_or_memory_that_is_full_on_one_rank(sharded, data, tmp_path, function, full):  # noqa: F811
    if function == "publish_parts" and full == 1:
        pytest.skip("rank 0 alone does that")

    def no_room(frame) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ranks = sharded(2, tmp_path, *new(data, "standard", *ENDLESS), plans={full: [(Moment(function), no_room)]})
    ranks[0].terminal.expect(r"step \d+/")
    if function == "_take_copy":
        ranks[0].terminal.send("s\n")
        ranks[0].terminal.expect("step_[0-9]+ not saved: No space left on device. Training goes on.")
    else:
        ranks[0].terminal.send("q\n")
        ranks[0].terminal.expect("❌ Emergency checkpoint not saved: No space left on device. Training goes on")
        assert not [name for name in os.listdir(tmp_path / "emergency_exit")]
    ranks[0].terminal.expect(r"step \d+/")
    ranks[0].terminal.send("q\n")
    texts, codes = finished(ranks)
    assert codes == [0, 0] and "Graceful exit completed" in texts[0]
    assert len(whole_directories(tmp_path)) == 1


def test_after_a_signal_a_full_disk_sends_all_parts_to_the_fallback(group, data, tmp_path):  # noqa: F811
    def full(frame) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ranks = group(2, "--checkpoint-dir", tmp_path / "ck", *new(data, "standard", *ENDLESS), plans={1: [(Moment("write_part"), full)]},
                  TMPDIR=str(tmp_path))
    ranks[0].terminal.expect(r"step \d+/")
    ranks[1].kill(signal.SIGTERM)
    texts, codes = finished(ranks)
    assert codes == [143, 143] and "Trying the temporary directory" in texts[0]
    path = saved_directory(texts[0])
    assert path.parent.parent == tmp_path and path.parent.name.startswith("train_graceful_")
    stop = (Moment("batch_done", event="return"), lambda frame: os.kill(os.getpid(), signal.SIGTERM))
    texts, codes = finished(group(2, "--checkpoint-dir", tmp_path / "ck", "--resume", "latest", plans={0: [stop]}, TMPDIR=str(tmp_path)))
    assert codes == [143, 143] and f"from {path}" in texts[0]


# ---- failures


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("mode, moment", [
    ("standard", Moment("forward", 14, where=lambda frame: type(frame.f_locals["self"]).__name__ == "Experts")),
    ("geometric", Moment("backward", 7, file="_tensor.py")),
    pytest.param("geometric", Moment("__getitem__", 5), marks=pytest.mark.campaign),
])
def test_an_exception_in_one_rank_saves_what_all_had_before(sharded, data, tmp_path, rank, mode, moment):  # noqa: F811
    """Each writes its part, though no group of theirs works any more; resumed, it is the same run."""
    finished(sharded(2, tmp_path / "whole", *new(data, mode)))
    ranks = sharded(2, tmp_path / "ck", *new(data, mode), plans={rank: [(moment, fail)]})
    texts, codes = finished(ranks)
    assert codes == [1, 1] and "RuntimeError: injected" in texts[rank] and "Traceback" not in texts[1 - rank], texts
    assert (f"RuntimeError in rank {rank}." in texts[0]) == (rank == 1)
    state = t.load_checkpoint(saved_directory(texts[0]))
    assert state["exit_reason"] == "exception_RuntimeError" and 1 <= state["step"] < STEPS
    texts, codes = finished(sharded(2, tmp_path / "ck", "--resume", "latest"))
    assert codes == [0, 0] and f"Resumed at step {state['step']} of" in texts[0]
    assert_same_end(tmp_path / "ck", tmp_path / "whole")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_in_the_middle_of_an_update_saves_nothing_half_updated(sharded, data, tmp_path, rank):  # noqa: F811
    ranks = sharded(2, tmp_path, *new(data), plans={rank: [(Moment("_update", 14), fail)]})
    texts, codes = finished(ranks)
    assert codes == [1, 1] and "nothing half-updated is saved" in texts[0], texts
    assert re.search(r"Newest whole checkpoint: \S+/(step_3|best)\n", texts[0].replace("\r", "")) and not (tmp_path / "emergency_exit").exists()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_dies_outright_takes_its_part_with_it(sharded, data, tmp_path, killed):  # noqa: F811
    """The others notice, say so and end in bounded time; the checkpoints from before are whole."""
    def impatient(frame) -> None:
        frame.f_globals["ANSWER_SECONDS"] = 1

    ranks = sharded(2, tmp_path, *new(data, "standard", "--steps", 10**6, "--save-every", 5), plans={rank: [(Moment("train"), impatient)] for rank in (0, 1)})
    ranks[0].terminal.expect(r"step 1\d/")
    ranks[killed].kill(signal.SIGKILL)
    texts, codes = finished(ranks)
    assert codes[killed] == -9 and codes[1 - killed] == 1
    if killed == 1:
        assert "Rank 1, which has a part of the model, does not answer" in texts[0] and "Newest whole checkpoint: " in texts[0], texts
    assert whole_directories(tmp_path)


def test_a_best_that_was_being_replaced_gets_its_name_back(sharded, data, tmp_path):  # noqa: F811
    """No call replaces a directory: between two renames it is there, whole, under a hidden name."""
    finished(sharded(2, tmp_path, *new(data)))
    step = t.load_checkpoint(tmp_path / "best")["step"]
    os.rename(tmp_path / "best", tmp_path / ".best.old")
    for leftover in (".best.tmp", ".step_9.tmp", ".step_3.old", "emergency_exit/.emergency_step_4.tmp"):
        (tmp_path / leftover).mkdir(parents=True)
        (tmp_path / leftover / "__0_0.distcp").write_text("half")
    (tmp_path / ".mine").mkdir()
    texts, codes = finished(sharded(2, tmp_path, "--resume", "latest", "--steps", STEPS + 1))
    assert codes == [0, 0]
    assert {path.name for path in tmp_path.rglob(".*") if path.name != ".metadata"} == {".mine"}
    assert t.load_checkpoint(tmp_path / "best")["step"] >= step


@needs_strace
def test_killed_at_every_kind_of_call_of_a_sharded_save(sharded, data, tmp_path, whole):  # noqa: F811
    """Rank 0 dies with SIGKILL at a call of its part of a save, or of the publishing; what has a name is whole, and the run goes on."""
    options = new(data, "standard", "--keep", 1)
    finished(sharded(2, tmp_path / "whole", *options))
    waits = [(Moment("_save", 3), None)]  # of step_6; step_3 and best are there
    calls = {"openat": (2,), "fsync": (4,), "rename": (1, 2), "unlinkat": (1,)}
    if whole:  # each of them, up to the last, and every tenth write
        calls = {call: itertools.count(1) for call in ("openat", "fsync", "rename", "unlink", "unlinkat", "mkdir")} | {"write": itertools.count(1, 10)}
    with Campaign("SIGKILL of a rank at every system call of a sharded save, then resumed") as campaign:
        for call, numbers in calls.items():
            more = True
            for number in numbers:
                directory = tmp_path / f"{call}-{number}"

                def killed() -> None:
                    nonlocal more
                    ranks = sharded(2, directory, *options, plans={0: waits})
                    strace = trace(ranks[0].paused(), directory.with_suffix(".trace"), "-e", f"inject={call}:signal=KILL:when={number}")
                    ranks[0].go()
                    ranks[0].finish()
                    strace.communicate()
                    if ranks[0].exitcode == 0:  # it has not so many such calls
                        ranks[1].finish()
                        more = False
                        campaign.cases -= 1
                        return
                    ranks[1].close()
                    assert whole_directories(directory)
                    texts, codes = finished(sharded(2, directory, "--resume", "latest"))
                    assert codes == [0, 0], texts
                    assert not list(directory.rglob(".*.tmp")) and not list(directory.rglob(".*.old"))
                    assert_same_end(directory, tmp_path / "whole")

                campaign.case(directory.name, killed)
                shutil.rmtree(directory, ignore_errors=True)
                if not more:
                    break


# ---- damage and strangers


@pytest.fixture(scope="module")
def parts(tmp_path_factory, data):  # noqa: F811
    """A directory with two sharded checkpoints, made without torchrun by conversion."""
    from campaign import Child

    directory = tmp_path_factory.mktemp("parts")
    child = Child(*OPTIONS, *MODES["geometric"], "--data", data, "--checkpoint-dir", directory / "one")
    child.finish()
    for name in ("step_3", "step_6"):
        t.convert_checkpoint(directory / "one" / f"{name}.pt", directory / name)
    shutil.rmtree(directory / "one")
    return directory


def test_damage_in_any_file_is_refused_and_skipped_by_latest(parts, sharded, tmp_path):
    files = sorted(path.name for path in (parts / "step_6").iterdir())
    assert files == [".metadata", "__0_0.distcp", "state.pt"]
    shutil.copytree(parts, tmp_path / "ck")
    shutil.copytree(parts / "step_6", tmp_path / "good")
    for name in files:
        file = tmp_path / "ck" / "step_6" / name
        good = file.read_bytes()
        flipped = good.find(b"run_id") if name == "state.pt" else len(good) // 2  # not in a zip file's padding
        for damaged in (good[:-1], good[:flipped] + bytes([good[flipped] ^ 1]) + good[flipped + 1 :], None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            with pytest.raises(t.CheckpointError):
                t.verify_checkpoint(file.parent)
            said = []
            assert t.latest_checkpoint(tmp_path / "ck", said.append).name == "step_3"
            assert len(said) == 1
            file.write_bytes(good)
    data_file = tmp_path / "ck" / "step_6" / "__0_0.distcp"
    data_file.write_bytes(bytes(len(data_file.read_bytes())))
    texts, codes = finished(sharded(2, tmp_path / "ck", "--resume", data_file.parent))
    assert codes == [2, 2] and texts[0] + texts[1] == f"error: {data_file.parent}: damaged checkpoint (file __0_0.distcp) (on rank 1)\r\n"
    texts, codes = finished(sharded(2, tmp_path / "ck", "--resume", "latest"))
    assert codes == [0, 0] and f"⚠️ Skipped {data_file.parent}: damaged" in texts[0] and "Resumed at step 3" in texts[0]


class Code:
    def __reduce__(self):
        return os.mkdir, ("/tmp/stranger_was_here",)


def rewritten(path, name: str, content: bytes) -> None:
    """A stranger, who can compute a checksum, puts content in the place of a file."""
    (path / name).write_bytes(content)
    state = t.read_index(path)
    state["files"][name] = t.size_and_sum(path / name)
    t.write_checkpoint(state, path / "state.pt")


def test_a_checkpoint_from_a_stranger_runs_no_code_and_reads_no_other_file(parts, tmp_path):
    path = tmp_path / "ck"
    hostile = [pickle.dumps(Code()), pickle.dumps({"state_dict_metadata": Code()}), b"", pickle.dumps(None), pickle.dumps({}), pickle.dumps(bytearray(9))]
    table = pickle.loads((parts / "step_6" / ".metadata").read_bytes())
    for change in ("path", "size", "dtype", "missing", "bytes"):
        changed = pickle.loads(pickle.dumps(table))
        key = "model_state_dict.head.weight"
        if change == "path":
            for info in changed.storage_data.values():
                info.relative_path = "../step_3/__0_0.distcp"
        elif change == "size":
            changed.state_dict_metadata[key].size = torch.Size([1, 1])
        elif change == "dtype":
            changed.state_dict_metadata[key].properties.dtype = torch.int64
        elif change == "missing":
            del changed.state_dict_metadata[key]
        else:
            changed.state_dict_metadata[key] = "text"
        hostile.append(pickle.dumps(changed))
    for content in hostile:
        shutil.copytree(parts / "step_6", path)
        rewritten(path, ".metadata", content)
        with pytest.raises(t.CheckpointError, match="damaged, or not a checkpoint"):
            t.load_checkpoint(path)
        shutil.rmtree(path)
    shutil.copytree(parts / "step_6", path)
    for files in (None, {"../step_3/.metadata": (1, 1)}, {".metadata": (1, 1), 3: 4}, {"state.pt": (1, 1)}):
        t.write_checkpoint({**t.read_index(parts / "step_6"), "files": files}, path / "state.pt")
        with pytest.raises(t.CheckpointError, match="names other files"):
            t.read_checkpoint(path)
    assert not os.path.exists("/tmp/stranger_was_here")


def test_meta_tensors_in_a_single_file_are_refused(tmp_path):
    torch.save({"a": torch.empty(2**50, device="meta")}, tmp_path / "a.pt")
    with pytest.raises(t.CheckpointError, match="it refers to"):
        t.load_checkpoint(tmp_path / "a.pt")


# ---- mistakes, and torchrun itself


def test_mistakes_say_what_to_do_instead(parts, group, data, tmp_path):  # noqa: F811
    assert "--shard needs torchrun's processes: scripts/train_torchrun.sh 2 --shard" in refused("--shard", "--data", data, *OPTIONS)
    for resume in (parts / "step_6", "latest"):
        message = refused("--resume", resume, "--checkpoint-dir", parts)
        assert "scripts/train_torchrun.sh" in message and f"--convert {parts}/step_6 NEW.pt" in message
    t.convert_checkpoint(parts / "step_6", tmp_path / "one.pt")
    texts, codes = finished(group(2, "--resume", tmp_path / "one.pt", "--shard"))
    assert codes == [2, 2] and f"--convert {tmp_path}/one.pt NEW" in texts[0]
    texts, codes = finished(group(2, "--resume", parts / "step_6", "--dim", 32))
    assert codes == [2, 2] and "--dim 32 does not fit the checkpoint" in texts[0]


def test_a_sharded_checkpoint_of_another_kind_is_refused(parts, tmp_path, group):  # noqa: F811
    shutil.copytree(parts / "step_6", tmp_path / "ck")
    state = t.read_index(tmp_path / "ck")
    state["config"]["shard"] = False
    t.write_checkpoint(state, tmp_path / "ck" / "state.pt")
    texts, codes = finished(group(2, "--resume", tmp_path / "ck"))
    assert codes == [2, 2] and "not a checkpoint of this program" in texts[0]


def test_q_in_torchruns_terminal_and_on_from_there(spawn, data, tmp_path):  # noqa: F811
    child = torchrun(spawn, SCRIPT, *new(data, "geometric", *ENDLESS), "--checkpoint-dir", tmp_path)
    child.expect(r"step \d+/")
    workers = worker_pids(child.pid)
    child.send("q\n")
    text = finish(child)
    assert child.exitstatus == 0 and "Graceful exit completed" in text and not any(map(alive, workers))
    path = saved_directory(text)
    assert re.search(rf"Resume with: \S*scripts/train_torchrun.sh 2 --resume {path}", text)
    child = torchrun(spawn, SCRIPT, "--resume", path, "--checkpoint-dir", tmp_path, size=1)
    child.expect(f"Resumed at step {t.load_checkpoint(path)['step']} of")
    child.expect(r"step \d+/")
    workers = worker_pids(child.pid)
    child.kill(signal.SIGTERM)
    finish(child)
    assert len(list((tmp_path / "emergency_exit").iterdir())) == 2 and not any(map(alive, workers))


def test_torchrun_killed_outright_leaves_no_worker(spawn, data, tmp_path):  # noqa: F811
    child = torchrun(spawn, SCRIPT, *new(data, "standard", *ENDLESS), "--checkpoint-dir", tmp_path)
    child.expect(r"step \d+/")
    workers = worker_pids(child.pid)
    os.kill(child.pid, signal.SIGKILL)
    wait_until(lambda: not any(map(alive, workers)))
    assert t.load_checkpoint(t.latest_checkpoint(tmp_path))["exit_reason"] == "torchrun_died"


@pytest.mark.campaign
def test_torchrun_restarts_from_the_last_sharded_save(spawn, data, tmp_path):  # noqa: F811
    assert_torchrun_restarts_from_the_last_save(spawn, r"step 1\d/", *new(data, "standard"), "--checkpoint-dir", tmp_path)
