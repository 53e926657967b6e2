"""scripts/checkpoints.py list, show and sample: what is there, read and never touched."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import MODES, ROOT, TINY, Forked, forked, run, session

import train_graceful as t

TOOL = ROOT / "scripts" / "checkpoints.py"
spec = importlib.util.spec_from_file_location("checkpoints", TOOL)
checkpoints = importlib.util.module_from_spec(spec)
spec.loader.exec_module(checkpoints)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    """The checkpoint directory of a finished run; one of its files is damaged, one is another program's."""
    directory = tmp_path_factory.mktemp("looking") / "ck"
    result = run(
        "--data",
        corpus,
        "--checkpoint-dir",
        directory,
        *TINY,
        *MODES["geometric"],
        "--steps",
        12,
        "--save-every",
        5,
        "--eval-every",
        6,
    )
    assert result.returncode == 0, result.stderr
    data = bytearray((directory / "step_10.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (directory / "step_10.pt").write_bytes(data)
    t.save_checkpoint({"a": torch.ones(3)}, directory / "mine.pt")
    torch.save(torch.nn.Linear(2, 2), directory / "model.pt")
    return directory


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """The directory of a run of somebody's own script: two models, a scheduler, other state, two values."""
    directory = tmp_path_factory.mktemp("mine") / "ck"

    def train(run: t.Run) -> None:
        run.data(range(8), range(4))
        model, critic = (
            run.model(torch.nn.Linear(1, 3)),
            run.model(torch.nn.BatchNorm1d(3), name="critic"),
        )
        optimizer = run.keep(
            optimizer=torch.optim.SGD(model.parameters(), run.options.speed, momentum=0.9)
        )
        run.keep(
            plan=torch.optim.lr_scheduler.StepLR(optimizer, 1000),
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            counter=Counter(),
        )
        for batch in run.batches(
            lambda batch: {"loss": batch * 1.0, "accuracy": batch * 0.0 + 0.25}, best="max accuracy"
        ):
            optimizer.zero_grad()
            critic(model(batch[:, None].float())).sum().backward()
            optimizer.step()

    assert (
        session(
            "--checkpoint-dir",
            directory,
            train=train,
            speed=0.125,
            hot=True,
            batch_size=2,
            steps=4,
            eval_every=4,
        )
        == 0
    )
    return directory


class Counter:
    def state_dict(self) -> dict:
        return {"seen": [1, 2, 3], "mean": torch.zeros(5)}

    def load_state_dict(self, state: dict) -> None:
        raise NotImplementedError


def untouched(directory) -> dict:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in directory.rglob("*")}


@pytest.fixture
def ask(trained, capsys):
    """ask(code, *args) is what the tool prints that ends with that exit code; it has changed nothing."""

    def asked(code: int, *args: object) -> str:
        before = untouched(trained)
        handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            assert checkpoints.main([*map(str, args)]) == code
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
        assert untouched(trained) == before
        output = capsys.readouterr()
        return output.out + output.err

    return asked


def rows_of(text: str) -> dict[str, str]:
    """{name: row} of what list prints, in its order."""
    header, *rows = text.splitlines()
    assert header.split() == ["step", "loss", "best", "age", "size", "run", "reason", "checkpoint"]
    return {Path(row.removesuffix(" <- latest").split()[-1]).name: row for row in rows}


def test_list_names_every_checkpoint_and_its_run_and_says_which_are_damaged(ask, trained, tmp_path):
    rows, state = rows_of(ask(0, "list", trained)), t.load_checkpoint(trained / "final.pt")
    assert {*list(rows)[:2]} == {"best.pt", "final.pt"} and list(rows)[2:] == [
        "step_10.pt",
        "step_5.pt",
        "mine.pt",
        "model.pt",
    ]
    final = rows["final.pt"].split()
    assert final[:3] == [
        "12",
        f"{state['metrics']['smooth_loss']:.4f}",
        f"{state['best']['value']:.4f}",
    ]
    assert (
        f" {state['run_id'][:6]}  completed " in rows["final.pt"]
        and f" {state['run_id'][:6]}  periodic " in rows["step_5.pt"]
    )
    assert (
        rows["step_10.pt"].split()[0] == "10"
        and f" {state['run_id'][:6]}  damaged " in rows["step_10.pt"]
    )
    assert " of another program " in rows["mine.pt"] and " damaged " in rows["model.pt"]
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck" / "gone.pt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "ck" / "final.pt")
    others = rows_of(ask(0, "list", tmp_path / "ck"))
    assert list(others) == ["final.pt", "gone.pt"] and all(
        "no checkpoint " in row for row in others.values()
    )


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_list_tells_what_may_not_be_read_from_what_is_damaged(ask, trained, tmp_path):
    shutil.copy(trained / "final.pt", tmp_path / "final.pt")
    (tmp_path / "final.pt").chmod(0)
    assert " unreadable " in rows_of(ask(0, "list", tmp_path))["final.pt"]


def test_list_puts_the_runs_of_a_directory_one_after_the_other(ask, trained, tmp_path):
    """Names and times of files say nothing."""
    state = t.load_checkpoint(trained / "final.pt")
    for name, run_id, step, saved_at in (
        ("a", "a" * 12, 30, "2026-01-01T00:00:00+00:00"),
        ("b", "b" * 12, 20, "2026-01-02T00:00:00+00:00"),
        ("c", "a" * 12, 10, "2026-01-03T00:00:00+00:00"),
        ("d", "b" * 12, 40, "2025-01-01T00:00:00+00:00"),
    ):
        t.save_checkpoint(
            {**state, "run_id": run_id, "step": step, "saved_at": saved_at}, tmp_path / f"{name}.pt"
        )
    text = ask(0, "list", tmp_path)
    assert list(rows_of(text)) == ["a.pt", "c.pt", "d.pt", "b.pt"]
    [marked] = [row for row in text.splitlines() if "<- latest" in row]
    assert "a.pt <- latest" in marked and t.latest_checkpoint(tmp_path).name == "a.pt"


def test_list_marks_what_latest_takes(ask, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "ck")
    state = t.load_checkpoint(trained / "final.pt")
    for name in ("final.pt", "best.pt"):
        (tmp_path / "ck" / name).unlink()
    t.save_checkpoint({**state, "format_version": 4, "step": 99}, tmp_path / "ck" / "step_99.pt")
    marked = [row for row in ask(0, "list", tmp_path / "ck").splitlines() if "<- latest" in row]
    assert len(marked) == 1 and "step_5.pt <- latest" in marked[0], "step_10.pt is damaged"
    result = run("--resume", "latest", "--checkpoint-dir", tmp_path / "ck", "--steps", 6)
    assert f"from {tmp_path}/ck/step_5.pt" in result.stdout


def test_show_prints_what_a_checkpoint_holds(ask, trained, tmp_path):
    text, state = ask(0, "show", trained / "final.pt"), t.load_checkpoint(trained / "final.pt")
    assert (
        re.search("\nStep: +12, after .* of training\n", text)
        and f"Saved:       {state['saved_at']} (completed)\n" in text
    )
    assert (
        re.search(f"\nBest: +min loss {state['best']['value']:.4f} at step 12\n", text)
        and f"{state['metrics']['smooth_loss']:.4f}" in text
    )
    assert re.search(
        f"\nEvaluation: +loss {state['evaluation']['values']['loss']:.4f} at step 12\n", text
    )
    assert re.search(
        "\nOptimizer: +expert: BatchedMuon, .* tensors, learning rate ", text
    ) and re.search("\nScheduler: +rotation: at step 12\n", text)
    weights = state["model_state_dict"].values()
    assert (
        f"\nModel:       model: {sum(weight.numel() for weight in weights):,} numbers in {len(weights)} tensors\n"
        in text
    )
    assert "--mode            geometric\n" in text and re.search(
        "--epochs +none  .default.\n", text
    )
    shutil.copytree(trained, tmp_path / "ck")
    (tmp_path / "ck" / "mine.pt").unlink()
    newest = t.latest_checkpoint(tmp_path / "ck")
    assert f"Checkpoint:  {newest}\n" in ask(0, "show", "--checkpoint-dir", tmp_path / "ck")


def test_show_prints_what_the_checkpoint_of_any_script_holds(ask, mine):
    text = ask(0, "show", mine / "final.pt")
    rows = [line.split(maxsplit=1) for line in text.splitlines()]
    for row in (
        ["Best:", "max accuracy 0.2500 at step 4"],
        ["Evaluation:", "loss 1.5000 at step 4"],
        ["Evaluation:", "accuracy 0.2500 at step 4"],
        ["Model:", "model: 6 numbers in 2 tensors"],
        ["Model:", "critic: 13 numbers in 5 tensors"],
        ["Optimizer:", "optimizer: SGD, 2 tensors, learning rate 0.125"],
        ["Scheduler:", "plan: at step 0"],
        ["State:", "scaler: empty"],
        ["State:", "counter: 5 numbers in 1 tensor and 3 other values"],
        ["Loop:", "gradients: 6 numbers in 2 tensors"],
        ["--speed", "0.125"],
        ["--hot", "True"],
        ["--batch-size", "2"],
    ):
        assert row in rows, text
    assert "Loss:" not in text and "default" not in text


def test_show_says_which_weights_a_schedule_free_optimizer_has_left(ask, mine, tmp_path):
    state = t.load_checkpoint(mine / "final.pt")
    state["optimizer_state_dicts"]["optimizer"]["param_groups"][0]["train_mode"] = True
    t.save_checkpoint(state, tmp_path / "final.pt")
    assert "weights are those that it trains, not those that it evaluates" in ask(
        0, "show", tmp_path / "final.pt"
    )


def test_show_says_what_stands_where_in_a_file_of_another_program(ask, trained, tmp_path):
    assert ask(0, "show", trained / "mine.pt").splitlines()[1:] == [
        "Saved:       by another program",
        "a:           3 numbers in 1 tensor",
    ]
    model, many = torch.nn.Linear(2, 3), [1, 2]
    for _ in range(8):
        many = [many, many]
    shared = {"a": model.weight, "b": model.weight}
    torch.save({"model": shared, "epoch": 4, "none": [], "many": many}, tmp_path / "a.pt")
    assert ask(0, "show", tmp_path / "a.pt").splitlines()[2:] == [
        "model:       6 numbers in 1 tensor",
        "epoch:       4",
        "none:        empty",
        "many:        2 other values",
    ]


def test_latest_does_not_stop_at_what_another_program_has_saved(ask, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "ck")
    state = t.load_checkpoint(trained / "final.pt")
    t.save_checkpoint({**state, "format_version": 4, "step": 99}, tmp_path / "ck" / "step_99.pt")
    t.save_checkpoint({"run_id": "x", "step": 1}, tmp_path / "ck" / "step_100.pt")
    text = ask(0, "show", "latest", "--checkpoint-dir", tmp_path / "ck")
    assert (
        re.search("\nStep: +12, ", text)
        and "Skipped " in text
        and "step_99.pt: not a checkpoint of this program" in text
    )
    assert ask(0, "sample", "--checkpoint-dir", tmp_path / "ck", "--prompt", "the ").count("the ")


def test_sample_always_writes_the_same_text(ask, trained):
    texts = [
        ask(0, "sample", trained / name, "--prompt", "the quick ")
        for name in ("step_5.pt", "step_5.pt", "final.pt")
    ]
    assert all(
        text.startswith("the quick ") and len(text.encode()) > checkpoints.SAMPLE_BYTES
        for text in texts
    )
    assert texts[0] == texts[1] != texts[2]


def test_it_samples_from_the_distribution_that_the_model_predicts(trained, capsys):
    """With hardly any temperature each byte is the most likely one after those before it."""
    checkpoints.sample(
        trained / "final.pt", "the quick ", torch.device("cpu"), length=5, temperature=1e-9
    )
    printed = capsys.readouterr().out
    state = t.load_checkpoint(trained / "final.pt")
    sizes = [
        state["config"][name]
        for name in ("context", "layers", "heads", "dim", "experts", "dropout")
    ]
    model = t.ByteLM(*sizes, rotations=True).eval()
    model.load_state_dict(state["model_state_dict"])
    written = list(b"the quick ")
    for _ in range(5):
        logits = model(torch.tensor([written[-16:]]))
        written.append(int(logits[0, -1].argmax()))
    assert printed == checkpoints.printable(bytes(written).decode(errors="replace")) + "\n"


def test_a_terminal_without_symbols_gets_question_marks(trained):
    result = subprocess.run(
        [sys.executable, TOOL, "sample", trained / "final.pt"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert result.returncode == 0 and result.stderr == b"" and result.stdout


def test_a_strangers_text_does_nothing_to_the_terminal(ask, trained, tmp_path):
    state = t.load_checkpoint(trained / "final.pt")
    state["torch_version"] = state["exit_reason"] = "\x1b]0;owned\x07"
    t.save_checkpoint(state, tmp_path / "a.pt")
    assert "\x1b" not in ask(0, "list", tmp_path) + ask(0, "show", tmp_path / "a.pt") + ask(
        0, "sample", trained / "final.pt"
    )


def test_a_full_disk_behind_the_output_is_one_line(trained):
    with open("/dev/full", "w") as full:
        result = forked(
            [sys.executable, TOOL, "list", trained], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (result.returncode, result.stderr) == (
        2,
        "error: standard output: No space left on device\n",
    )


def test_a_reader_that_goes_away_is_no_traceback(trained):
    process = Forked(
        [sys.executable, TOOL, "sample", trained / "final.pt"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141
    process.stderr.close()


def test_mistakes(ask, trained, mine, tmp_path):
    def message(*args) -> str:
        text = ask(2, *args)
        assert text.startswith("error: ") and text.count("\n") == 1, text
        return text

    assert "no checkpoints" in message("list", tmp_path)
    assert "is a directory of checkpoints; its latest is" in message("show", trained)
    assert "damaged checkpoint (record" in message("show", trained / "step_10.pt")
    for other in (trained / "mine.pt", mine / "final.pt"):
        assert (
            message("sample", other)
            == f"error: {other}: sample works for the built-in model alone, and this is another\n"
        )
    assert "invalid choice: 'lost'" in message("lost")
    assert f"{trained / 'mine.pt'} is a file; show {trained / 'mine.pt'}" in message(
        "list", trained / "mine.pt"
    )
    assert "no checkpoint there" in message("sample", "--checkpoint-dir", tmp_path)
    nowhere = tmp_path / "nowhere"
    assert message("list", nowhere) == f"error: {nowhere}: No such file or directory\n"
    error = f"error: {nowhere}: no checkpoint there\n"
    assert message("sample", "--checkpoint-dir", nowhere) == error
    assert message("show", "latst", "--checkpoint-dir", trained).endswith(
        "No such file or directory; scripts/checkpoints.py list shows what there is\n"
    )


@pytest.mark.parametrize(
    "name, value",
    [
        ("layers", 10**12),
        ("experts", 10**12),
        ("dim", 10**12),
        ("heads", 3),
        ("context", 10**12),
        ("mode", "standard"),
        ("dim", "wide"),
    ],
)
def test_a_configuration_that_is_not_the_models_is_one_line_and_takes_no_memory(
    ask, trained, tmp_path, name, value
):
    state = t.load_checkpoint(trained / "final.pt")
    t.save_checkpoint({**state, "config": {**state["config"], name: value}}, tmp_path / "wrong.pt")
    text = ask(2, "sample", tmp_path / "wrong.pt")
    assert text.startswith("error: ") and text.count("\n") == 1


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_whatever_stands_in_the_place_of_a_value_is_shown_or_one_line(ask, trained, tmp_path):
    state = t.load_checkpoint(trained / "final.pt")
    for key in state:
        for value in (None, -1, "x", [], {}, {1: torch.ones(2)}, torch.ones(2)):
            t.save_checkpoint({**state, key: value}, tmp_path / "wrong.pt")
            assert "Checkpoint: " in ask(0, "show", tmp_path / "wrong.pt") and "wrong.pt" in ask(
                0, "list", tmp_path
            )
