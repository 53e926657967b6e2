"""Many processes train one model: the same batches on any number of them, one departure for all, the same run after it.

Most groups are forks of this process, each a rank with a terminal of its own; what torchrun itself does is tested with it.
"""

import os
import re
import signal
import socket
import sys
import time

import pytest
import torch
from campaign import Moment
from conftest import ENDLESS, MODES, ROOT, SCRIPT, finish, saved_path, wait_until
from test_faults_stops import assert_same_end
from test_resume import corpus_of, metrics_without_times

import train_graceful as t

STEPS = 8
OPTIONS = ["--context", 16, "--layers", 2, "--heads", 2, "--dim", 16, "--experts", 2, "--batch-size", 4, "--grad-accum", 2, "--warmup-steps", 3,
           "--steps", STEPS, "--log-every", 1, "--eval-every", 4, "--save-every", 3]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return corpus_of(tmp_path_factory.mktemp("many") / "corpus.txt", windows=5 * 8 + 3)


@pytest.fixture
def float32_muon(monkeypatch):
    """In bfloat16 Muon would make a rounding error of a gradient one of a hundredth."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})


@pytest.fixture
def group(fork):
    """group(size, *options, plans={rank: plan}) starts that many ranks."""
    stores = []

    def start(size: int, *options: object, plans: dict = {}, **environment: str):
        listener = socket.create_server(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
        stores.append(serve_store(listener))
        return [fork(*options, plan=plans.get(rank, ()), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
                     MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RUN_ID="test",
                     TORCHELASTIC_MAX_RESTARTS="0", TORCHELASTIC_RESTART_COUNT="0", **environment) for rank in range(size)]

    yield start
    for pid in stores:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def serve_store(listener: socket.socket) -> int:
    """Starts torchrun's part. In a process of its own: a lock that a thread of ours held while a rank is forked would stay locked there."""
    pid = os.fork()
    if pid == 0:
        try:
            os.closerange(3, listener.fileno())
            os.closerange(listener.fileno() + 1, 1000)
            _store = torch.distributed.TCPStore("127.0.0.1", listener.getsockname()[1], is_master=True, wait_for_workers=False,
                                                master_listen_fd=listener.fileno())
            signal.pause()
        finally:
            os._exit(1)
    listener.close()
    return pid


def finished(ranks) -> tuple[list[str], list[int]]:
    texts = [rank.finish() for rank in ranks]
    return texts, [rank.exitcode for rank in ranks]


def final(directory) -> dict:
    return t.load_checkpoint(directory / "final.pt")


def assert_close_end(left, right) -> None:
    """The same batches, added up in another order."""
    a, b = final(left), final(right)
    assert (a["step"], a["epoch"], a["batch_in_epoch"]) == (b["step"], b["epoch"], b["batch_in_epoch"])
    for name, weight in a["model_state_dict"].items():
        torch.testing.assert_close(weight, b["model_state_dict"][name], rtol=0, atol=2e-4, msg=name)
    for row, other in zip(metrics_without_times(left), metrics_without_times(right), strict=True):
        assert row["step"] == other["step"] and float(row["loss"]) == pytest.approx(float(other["loss"]), abs=1e-4)
        assert bool(row["val_loss"]) == bool(other["val_loss"])
        assert not row["val_loss"] or float(row["val_loss"]) == pytest.approx(float(other["val_loss"]), abs=1e-4)


def test_the_processes_share_out_the_windows_of_each_batch(data):
    config = t.Config.from_options({"data": (str(data),), "context": 16, "batch_size": 4, "grad_accum": 2})
    whole = t.ByteDataset(config)
    for size in (2, 4):
        shares = [t.ByteDataset(config, rank, size) for rank in range(size)]
        for number in (0, 4, 7):
            assert torch.stack([share[number] for share in shares], dim=1).flatten(0, 1).equal(whole[number])
            for i in range(2):  # and of each forward pass
                parts = torch.cat([share[number].chunk(2)[i] for share in shares])
                assert sorted(parts.tolist()) == sorted(whole[number].chunk(2)[i].tolist())
        batches = [list(share.validation_batches()) for share in shares]
        assert len({len(share) for share in batches}) == 1
        texts = [window.tolist() for share in batches for batch in share for window in batch]
        assert sorted(texts) == sorted(window.tolist() for batch in whole.validation_batches() for window in batch)
    message = r"--batch-size 4 cannot be shared out equally among 3 processes"
    with pytest.raises(t.UserError, match=message):
        t.ByteDataset(config, 0, 3)


@pytest.mark.parametrize("mode", ["standard", "geometric"])
def test_one_two_and_four_processes_train_the_same_model(group, float32_muon, data, tmp_path, mode):
    for size in (1, 2, 4):
        texts, codes = finished(group(size, *OPTIONS, *MODES[mode], "--data", data, "--checkpoint-dir", tmp_path / str(size)))
        assert codes == [0] * size and "All steps done" in texts[0] and texts[1:] == [""] * (size - 1), texts
        assert {path.name for path in (tmp_path / str(size)).iterdir()} == {"best.pt", "final.pt", "metrics.csv", "run.lock", "step_3.pt", "step_6.pt"}
    assert_close_end(tmp_path / "2", tmp_path / "1")
    assert_close_end(tmp_path / "4", tmp_path / "1")
    assert final(tmp_path / "4").keys() == final(tmp_path / "1").keys()  # one format


@pytest.mark.parametrize("mode, size", [("standard", 2), ("controller", 2), ("geometric", 2), ("geometric", 4)])
def test_stopped_by_any_rank_and_resumed_is_the_same_run(group, data, tmp_path, mode, size):
    options = [*OPTIONS, *MODES[mode], "--dropout", 0.1, "--data", data]
    finished(group(size, *options, "--checkpoint-dir", tmp_path / "whole"))
    directory, arguments = tmp_path / "stopped", options
    for rank, signum, moment in [(size - 1, signal.SIGTERM, Moment("forward_backward", 3)), (0, signal.SIGUSR1, Moment("evaluate"))]:
        stop = (moment, lambda frame, signum=signum: os.kill(os.getpid(), signum))
        texts, codes = finished(group(size, *arguments, "--checkpoint-dir", directory, plans={rank: [stop]}))
        assert codes == [128 + signum] * size and texts[0].count("Exit requested") == 1, texts
        state = t.load_checkpoint(saved_path(texts[0]))
        assert state["exit_reason"] == f"signal_{signum.name}" and 1 <= state["step"] < STEPS
        arguments = ["--resume", "latest"]
    texts, codes = finished(group(size, *arguments, "--checkpoint-dir", directory))
    assert codes == [0] * size, texts
    assert_same_end(directory, tmp_path / "whole")


def test_a_run_goes_on_with_any_number_of_processes(group, float32_muon, data, tmp_path):
    finished(group(1, *OPTIONS, *MODES["geometric"], "--data", data, "--steps", 16, "--checkpoint-dir", tmp_path / "whole"))
    arguments = [*OPTIONS, *MODES["geometric"], "--data", data, "--steps", 16]
    stop = (Moment("batch_done", event="return"), lambda frame: os.kill(os.getpid(), signal.SIGTERM))
    steps = []
    for size in (1, 2, 4, 1):
        plans = {} if size == 1 and steps else {0: [stop]}
        texts, codes = finished(group(size, *arguments, "--checkpoint-dir", tmp_path / "moved", plans=plans))
        assert codes == [143 if plans else 0] * size, texts
        steps.append(t.load_checkpoint(t.latest_checkpoint(tmp_path / "moved"))["step"])
        arguments = ["--resume", "latest"]
    assert 1 <= steps[0] < steps[1] < steps[2] < steps[3] == 16
    assert_close_end(tmp_path / "moved", tmp_path / "whole")


def test_q_typed_for_rank_0_and_s_before_it(group, data, tmp_path):
    ranks = group(2, *OPTIONS, *ENDLESS, "--data", data, "--checkpoint-dir", tmp_path)
    ranks[0].terminal.expect(r"step \d+/")
    ranks[0].terminal.send("s\n")
    ranks[0].terminal.expect("Checkpoint saved: ")
    ranks[0].terminal.send("q\n")
    texts, codes = finished(ranks)
    assert codes == [0, 0] and "Graceful exit completed" in texts[0] and not texts[1]
    assert t.load_checkpoint(saved_path(texts[0]))["exit_reason"] == "user_requested_graceful_exit"
    assert len(list(tmp_path.glob("step_*.pt"))) == 1


def test_an_exception_in_one_rank_ends_all_with_a_checkpoint(group, data, tmp_path):
    def fail(frame) -> None:
        raise ValueError("a bad record")

    ranks = group(2, *OPTIONS, *ENDLESS, "--data", data, "--checkpoint-dir", tmp_path, plans={1: [(Moment("task_loss", 7), fail)]})
    texts, codes = finished(ranks)
    assert codes == [1, 1] and "a bad record" in texts[1]
    assert "ValueError in rank 1." in texts[0] and "Traceback" not in texts[0]
    state = t.load_checkpoint(saved_path(texts[0]))
    assert state["exit_reason"] == "exception_ValueError" and state["step"] == 2


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_dies_outright_is_noticed(group, data, tmp_path, killed):
    ranks = group(2, *OPTIONS, *ENDLESS, "--data", data, "--checkpoint-dir", tmp_path)
    ranks[0].terminal.expect(r"step \d+/")
    ranks[killed].kill(signal.SIGKILL)
    texts, codes = finished(ranks)
    assert codes[killed] == -9 and codes[1 - killed] == 1
    if killed == 1:
        assert t.load_checkpoint(saved_path(texts[0]))["exit_reason"].startswith("exception_")
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_stopped_rank_holds_the_others_up_and_nothing_more(group, data, tmp_path, whole):
    ranks = group(2, *OPTIONS, *ENDLESS, "--data", data, "--checkpoint-dir", tmp_path)
    ranks[0].terminal.expect(r"step \d+/")
    ranks[1].kill(signal.SIGSTOP)
    ranks[0].kill(signal.SIGTERM)
    ranks[0].terminal.expect("Exit requested")
    time.sleep(20 if whole else 0)  # is not the others' end
    ranks[1].kill(signal.SIGCONT)
    texts, codes = finished(ranks)
    assert codes == [143, 143] and "Emergency checkpoint saved" in texts[0]


def test_a_save_that_fails_on_rank_0_keeps_all_training(group, data, tmp_path):
    ranks = group(2, *OPTIONS, *ENDLESS, "--data", data, "--checkpoint-dir", tmp_path)
    ranks[0].terminal.expect(r"step \d+/")
    (tmp_path / "emergency_exit").write_text("in the way")
    ranks[0].terminal.send("q\n")
    ranks[0].terminal.expect("not saved: .*Training goes on")
    ranks[0].terminal.expect(r"step \d+/")
    (tmp_path / "emergency_exit").unlink()
    ranks[0].terminal.send("q\n")
    texts, codes = finished(ranks)
    assert codes == [0, 0] and "Emergency checkpoint saved" in texts[0]


def test_a_mistake_is_one_line_and_exit_code_2_of_all(group, data, tmp_path):
    holder = group(1, *OPTIONS, *ENDLESS, "--data", data, "--checkpoint-dir", tmp_path)
    holder[0].terminal.expect(r"step \d+/")
    for arguments, message in [(["--data", data, "--checkpoint-dir", tmp_path], "in use by another run"),
                               (["--data", data, "--batch-size", 5], "cannot be shared out"),
                               (["--data", tmp_path / "none"], "No such file"), (["--resume", "latest", "--checkpoint-dir", tmp_path / "ck"], "No such file"),
                               (["--batch-siez", 4], "batch-siez")]:
        texts, codes = finished(group(2, *OPTIONS, *arguments))
        assert codes == [2, 2] and texts[1] == "" and texts[0].count("\n") == 1 and message in texts[0], texts
        assert "\rerror: " in "\r" + texts[0]  # no status line is left before it


# ---- torchrun itself


def torchrun(spawn, *words: object, size: int = 2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", *words]
    return spawn(command=[str(word) for word in command])


def alive(pid: int) -> bool:
    """And no zombie that only an absent init would reap."""
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def worker_pids(parent: int) -> list[int]:
    return [int(pid) for pid in open(f"/proc/{parent}/task/{parent}/children").read().split()]


def test_q_and_enter_in_torchruns_terminal(spawn, data, tmp_path):
    child = torchrun(spawn, SCRIPT, *OPTIONS, *ENDLESS, "--data", data, "--checkpoint-dir", tmp_path)
    child.expect(r"step \d+/")
    workers = worker_pids(child.pid)
    child.send("q\n")
    text = finish(child)
    assert child.exitstatus == 0 and "Graceful exit completed" in text
    assert re.search(r"Resume with: \S*scripts/train_torchrun.sh 2 --resume ", text), text
    assert len(workers) == 2 and not any(map(alive, workers))


def by_script(spawn, *words: object):
    return spawn(command=[str(ROOT / "scripts" / "train_torchrun.sh"), *map(str, words)], env={**os.environ, "PYTHON": sys.executable})


def test_ctrl_c_in_torchruns_terminal_counts_once_and_the_summary_stands_last(spawn, data, tmp_path):
    child = by_script(spawn, 2, *OPTIONS, *ENDLESS, "--data", data, "--checkpoint-dir", tmp_path)
    child.expect(r"step \d+/")
    workers = worker_pids(child.pid)
    child.sendintr()
    text = finish(child)
    assert child.exitstatus == 130 and "Emergency checkpoint saved" in text and "Second Ctrl-C" not in text
    assert "Traceback" not in text and "Resume with" in text
    assert t.load_checkpoint(saved_path(text))["exit_reason"] == "signal_SIGINT"
    assert not any(map(alive, workers))


def test_a_mistake_is_not_buried_by_torchrun(spawn, data, tmp_path):
    child = by_script(spawn, 2, "--stps", 5)
    lines = finish(child).splitlines()
    assert child.exitstatus == 2 and "error: unrecognized arguments: --stps 5 (did you mean --steps?)" in lines
    assert len(lines) <= 3  # beside it what torchrun says of the process that failed first, and of the other


def test_a_job_in_the_background_leaves_the_keyboard_to_the_shell(spawn, data, tmp_path):
    shell = spawn(command=["bash", "--norc", "--noprofile", "-i"], env={**os.environ, "PS1": "$ "})
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT, *OPTIONS, *ENDLESS, "--data", data,
             "--checkpoint-dir", tmp_path]
    shell.sendline(" ".join(map(str, words)) + " &")
    shell.expect(r"step \d+/")
    for number in range(5):
        shell.sendline(f"echo sum $(({number} + 100))")
        shell.expect(f"sum {number + 100}")
    shell.sendline("fg")
    shell.expect(r"step \d+/")
    shell.sendline("q")
    shell.expect("Graceful exit completed")
    shell.sendline("exit")
    finish(shell)


def test_leaving_is_no_failure_that_torchrun_would_mend(spawn, data, tmp_path):
    child = torchrun(spawn, "--max-restarts=1", SCRIPT, *OPTIONS, *ENDLESS, "--data", data, "--checkpoint-dir", tmp_path, "--resume", "latest")
    child.expect(r"step \d+/")
    os.kill(worker_pids(child.pid)[1], signal.SIGTERM)
    text = finish(child)
    assert child.exitstatus == 0 and text.count("Training Summary") == 1 and "Resumed" not in text
    assert (tmp_path / "run.lock").read_text().splitlines()[1] == "143"


def test_torchrun_killed_outright_leaves_no_worker(spawn, data, tmp_path):
    child = torchrun(spawn, SCRIPT, *OPTIONS, *ENDLESS, "--data", data, "--checkpoint-dir", tmp_path)
    child.expect(r"step \d+/")
    workers = worker_pids(child.pid)
    os.kill(child.pid, signal.SIGKILL)
    wait_until(lambda: not any(map(alive, workers)))
    assert t.latest_checkpoint(tmp_path)


def assert_torchrun_restarts_from_the_last_save(spawn, due: str, *options: object) -> None:
    """One of its processes is killed when the text that is due shows."""
    child = torchrun(spawn, "--max-restarts=1", SCRIPT, *options, "--steps", 60, "--save-every", 5, "--resume", "latest")
    child.expect(due)
    os.kill(worker_pids(child.pid)[1], signal.SIGKILL)
    text = finish(child)
    assert re.search(r"Resumed at step \d+ of 60", text), text
    assert child.exitstatus == 0 and "All steps done" in text


def test_torchrun_restarts_from_the_last_save(spawn, data, tmp_path):
    assert_torchrun_restarts_from_the_last_save(spawn, r"step \d+/", *OPTIONS, "--data", data, "--checkpoint-dir", tmp_path)
