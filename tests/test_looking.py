"""What scripts/checkpoints.py and scripts/plot.py show is what is there, read and never touched.

And whatever stands in a file is shown or a line, and does nothing to the terminal.
"""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from helpers import MODES, ROOT, TINY, Forked, ask_to_leave, forked, run, session

import train_graceful as t


def imported(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


checkpoints = imported("checkpoints")
TOOL = [sys.executable, ROOT / "scripts" / "checkpoints.py"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    """Of a finished run; one of its files is damaged, others are another program's."""
    directory = tmp_path_factory.mktemp("looking") / "ck"
    words = [*TINY, *MODES["geometric"], *"--steps 12 --save-every 5 --eval-every 6".split()]
    result = run("--data", corpus, "--checkpoint-dir", directory, *words)
    assert result.returncode == 0, result.stderr
    data = bytearray((directory / "step_10.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (directory / "step_10.pt").write_bytes(data)
    t.save_checkpoint({"a": torch.ones(3)}, directory / "mine.pt")
    torch.save(torch.nn.Linear(2, 2), directory / "model.pt")
    return directory


@pytest.fixture
def altered(trained, tmp_path):
    """altered(**changes) is a changed final.pt, in a directory of its own."""

    def alter(name="altered.pt", **changes) -> Path:
        path = tmp_path / "altered" / name
        path.parent.mkdir(exist_ok=True)
        t.save_checkpoint({**t.load_checkpoint(trained / "final.pt"), **changes}, path)
        return path

    return alter


class Counter:
    def state_dict(self) -> dict:
        return {"seen": [1, 2, 3], "mean": torch.zeros(5)}

    def load_state_dict(self, state: dict) -> None:
        raise NotImplementedError


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """Of a run of somebody's own script: two models, a scheduler, other state, two values."""
    directory = tmp_path_factory.mktemp("mine") / "ck"

    def train(run: t.Run) -> None:
        run.data(range(8), range(4))
        model = run.model(torch.nn.Linear(1, 3))
        critic = run.model(torch.nn.BatchNorm1d(3), name="critic")
        sgd = torch.optim.SGD(model.parameters(), run.options.speed, momentum=0.9)
        optimizer = run.keep(optimizer=sgd)
        run.keep(plan=torch.optim.lr_scheduler.StepLR(optimizer, 1000))
        run.keep(scaler=torch.amp.GradScaler("cpu", enabled=False), counter=Counter())

        def evaluate(batch):
            return {"loss": batch * 1.0, "accuracy": batch * 0.0 + 0.25}

        for batch in run.batches(evaluate, best="max accuracy"):
            optimizer.zero_grad()
            critic(model(batch[:, None].float())).sum().backward()
            optimizer.step()

    own = {"speed": 0.125, "hot": True, "batch_size": 2, "steps": 4, "eval_every": 4}
    assert session("--checkpoint-dir", directory, train=train, **own) == 0
    return directory


def untouched(directory) -> dict:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in directory.rglob("*")}


@pytest.fixture
def ask(trained, capsys):
    """ask(code, *args) is what the tool prints that ends with that code; it changes nothing."""

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
        text = output.out + output.err
        assert code == 0 or text.startswith("error: ") and text.count("\n") == 1, text
        return text

    return asked


# ---- list


def rows_of(text: str) -> dict[str, str]:
    """{name: row} of what list prints, in its order."""
    header, *rows = text.splitlines()
    assert header.split() == ["step", "loss", "best", "age", "size", "run", "reason", "checkpoint"]
    return {Path(row.removesuffix(" <- latest").split()[-1]).name: row for row in rows}


def test_list_names_every_checkpoint_and_its_run_and_says_which_are_damaged(ask, trained, tmp_path):
    rows, state = rows_of(ask(0, "list", trained)), t.load_checkpoint(trained / "final.pt")
    assert {*list(rows)[:2]} == {"best.pt", "final.pt"}
    assert list(rows)[2:] == ["step_10.pt", "step_5.pt", "mine.pt", "model.pt"]
    loss, best = state["metrics"]["smooth_loss"], state["best"]["value"]
    assert rows["final.pt"].split()[:3] == ["12", f"{loss:.4f}", f"{best:.4f}"]
    assert rows["step_10.pt"].split()[0] == "10"
    reasons = {"final.pt": "completed", "step_5.pt": "periodic", "step_10.pt": "damaged"}
    for name, reason in reasons.items():
        assert f" {state['run_id'][:6]}  {reason} " in rows[name]
    assert " of another program " in rows["mine.pt"] and " damaged " in rows["model.pt"]
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck" / "gone.pt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "ck" / "final.pt")
    others = rows_of(ask(0, "list", tmp_path / "ck"))
    assert list(others) == ["final.pt", "gone.pt"]
    assert all("no checkpoint " in row for row in others.values())


def test_list_puts_the_runs_of_a_directory_one_after_the_other(ask, altered):
    """Names and times of files say nothing."""
    for name, run_id, step, saved_at in (
        ("a.pt", "a" * 12, 30, "2026-01-01T00:00:00+00:00"),
        ("b.pt", "b" * 12, 20, "2026-01-02T00:00:00+00:00"),
        ("c.pt", "a" * 12, 10, "2026-01-03T00:00:00+00:00"),
        ("d.pt", "b" * 12, 40, "2025-01-01T00:00:00+00:00"),
    ):
        path = altered(name, run_id=run_id, step=step, saved_at=saved_at)
    text = ask(0, "list", path.parent)
    assert list(rows_of(text)) == ["a.pt", "c.pt", "d.pt", "b.pt"]
    [marked] = [row for row in text.splitlines() if "<- latest" in row]
    assert "a.pt <- latest" in marked and t.latest_checkpoint(path.parent).name == "a.pt"


def test_latest_is_whole_and_of_this_program_for_list_show_sample_and_resume(
    ask, trained, tmp_path
):
    directory = shutil.copytree(trained, tmp_path / "ck")
    for name in ("final.pt", "best.pt"):
        (directory / name).unlink()
    state = t.load_checkpoint(trained / "final.pt")
    t.save_checkpoint({**state, "format_version": 4, "step": 99}, directory / "step_99.pt")
    t.save_checkpoint({"run_id": "x", "step": 1}, directory / "step_100.pt")
    where = ["--checkpoint-dir", directory]
    [marked] = [row for row in ask(0, "list", directory).splitlines() if "<- latest" in row]
    assert "step_5.pt <- latest" in marked, "step_10.pt is damaged"
    for words in (["show", "latest"], ["show"]):
        text = ask(0, *words, *where)
        assert f"Checkpoint:  {directory}/step_5.pt\n" in text
        assert "Skipped " in text and "step_99.pt: not a checkpoint of this program" in text
    assert "the " in ask(0, "sample", *where, "--prompt", "the ")
    assert f"from {directory}/step_5.pt" in run("--resume", "latest", *where, "--steps", 6).stdout


# ---- show


def test_show_prints_what_a_checkpoint_holds(ask, trained):
    text, state = ask(0, "show", trained / "final.pt"), t.load_checkpoint(trained / "final.pt")
    best, evaluation = state["best"]["value"], state["evaluation"]["values"]["loss"]
    weights = state["model_state_dict"].values()
    numbers = f"{sum(weight.numel() for weight in weights):,}"
    for line in (
        "Step: +12, after .* of training",
        f"Saved: +{re.escape(state['saved_at'])} .completed.",
        f"Best: +min loss {best:.4f} at step 12",
        f"Evaluation: +loss {evaluation:.4f} at step 12",
        "Optimizer: +expert: BatchedMuon, .* tensors, learning rate .*",
        "Scheduler: +rotation: at step 12",
        f"Model: +model: {numbers} numbers in {len(weights)} tensors",
        " *--mode +geometric",
        " *--epochs +none  .default.",
    ):
        assert re.search(f"^{line}$", text, re.M), line
    assert f"{state['metrics']['smooth_loss']:.4f}" in text


OF_MINE = """
Best: max accuracy 0.2500 at step 4
Evaluation: loss 1.5000 at step 4
Evaluation: accuracy 0.2500 at step 4
Model: model: 6 numbers in 2 tensors
Model: critic: 13 numbers in 5 tensors
Optimizer: optimizer: SGD, 2 tensors, learning rate 0.125
Scheduler: plan: at step 0
State: scaler: empty
State: counter: 5 numbers in 1 tensor and 3 other values
Loop: gradients: 6 numbers in 2 tensors
--speed 0.125
--hot True
--batch-size 2
"""


def test_show_prints_what_the_checkpoint_of_any_script_holds(ask, mine, tmp_path):
    text = ask(0, "show", mine / "final.pt")
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert {*OF_MINE.strip().splitlines()} <= {*rows}, text
    assert "Loss:" not in text and "default" not in text
    state = t.load_checkpoint(mine / "final.pt")
    # As a schedule-free optimizer has it.
    state["optimizer_state_dicts"]["optimizer"]["param_groups"][0]["train_mode"] = True
    t.save_checkpoint(state, tmp_path / "final.pt")
    text = ask(0, "show", tmp_path / "final.pt")
    assert "weights are those that it trains, not those that it evaluates" in text


def test_show_says_what_stands_where_in_a_file_of_another_program(ask, trained, tmp_path):
    said = ["Saved:       by another program", "a:           3 numbers in 1 tensor"]
    assert ask(0, "show", trained / "mine.pt").splitlines()[1:] == said
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


# ---- sample


def test_sample_always_writes_the_same_text_as_the_model_predicts_it(ask, trained, capsys):
    names = ("step_5.pt", "step_5.pt", "final.pt")
    texts = [ask(0, "sample", trained / name, "--prompt", "the quick ") for name in names]
    for text in texts:
        assert text.startswith("the quick ") and len(text.encode()) > checkpoints.SAMPLE_BYTES
    assert texts[0] == texts[1] != texts[2]
    # With hardly any temperature each byte is the most likely one after those before it.
    path, cpu = trained / "final.pt", torch.device("cpu")
    checkpoints.sample(path, "the quick ", cpu, length=5, temperature=1e-9)
    printed, state = capsys.readouterr().out, t.load_checkpoint(path)
    sizes = [state["config"][name] for name in "context layers heads dim experts dropout".split()]
    model = t.ByteLM(*sizes, rotations=True).eval()
    model.load_state_dict(state["model_state_dict"])
    written = list(b"the quick ")
    for _ in range(5):
        logits = model(torch.tensor([written[-16:]]))
        written.append(int(logits[0, -1].argmax()))
    assert printed == checkpoints.printable(bytes(written).decode(errors="replace")) + "\n"


HUGE = 10**12
SIZES = [("layers", HUGE), ("experts", HUGE), ("dim", HUGE), ("context", HUGE)]


@pytest.mark.parametrize("name, value", [*SIZES, ("heads", 3), ("mode", "standard"), ("dim", "x")])
def test_a_configuration_that_is_not_the_models_is_one_line_and_takes_no_memory(
    ask, trained, altered, name, value
):
    config = t.load_checkpoint(trained / "final.pt")["config"]
    ask(2, "sample", altered(config={**config, name: value}))


# ---- all three


def test_mistakes(ask, trained, mine, tmp_path):
    foreign, nowhere = trained / "mine.pt", tmp_path / "nowhere"
    where = ["--checkpoint-dir", nowhere]
    for words, said in (
        (["list", tmp_path], "no checkpoints"),
        (["list", nowhere], f"error: {nowhere}: No such file or directory\n"),
        (["list", foreign], f"{foreign} is a file; show {foreign}"),
        (["show", trained], "is a directory of checkpoints; its latest is"),
        (["show", trained / "step_10.pt"], "damaged checkpoint (record"),
        (["show", "latst"], "No such file or directory; scripts/checkpoints.py list shows what"),
        (["sample", "--checkpoint-dir", tmp_path], "no checkpoint there"),
        (["sample", *where], f"error: {nowhere}: no checkpoint there\n"),
        (["sample", foreign], f"error: {foreign}: sample works for the built-in model alone"),
        (["sample", mine / "final.pt"], "sample works for the built-in model alone"),
        (["lost"], "invalid choice: 'lost'"),
    ):
        assert said in ask(2, *words), words


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_whatever_stands_in_the_place_of_a_value_is_shown_or_one_line(ask, trained, altered):
    for key in t.load_checkpoint(trained / "final.pt"):
        for value in (None, -1, "x", [], {}, {1: torch.ones(2)}, torch.ones(2)):
            path = altered(**{key: value})
            assert "Checkpoint: " in ask(0, "show", path)
            assert path.name in ask(0, "list", path.parent)
    path = altered(torch_version="\x1b]0;owned\x07", exit_reason="\x1b]0;owned\x07")
    said = ask(0, "list", path.parent) + ask(0, "show", path) + ask(0, "sample", path)
    assert "\x1b" not in said


def test_an_output_that_is_full_closed_or_without_symbols_is_no_traceback(trained):
    said = {"stderr": subprocess.PIPE, "text": True}
    with open("/dev/full", "w") as full:
        result = forked([*TOOL, "list", trained], stdout=full, **said)
    assert result.stderr == "error: standard output: No space left on device\n"
    assert result.returncode == 2
    sample = [*TOOL, "sample", trained / "final.pt"]
    with Forked(sample, stdout=subprocess.PIPE, **said) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 141
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(sample, stdout=subprocess.PIPE, **said, env=ascii_only)
    assert (result.returncode, result.stderr) == (0, "") and result.stdout


# ---- plot

SVG = "{http://www.w3.org/2000/svg}"
HEADER = "step,epoch,loss,val_loss,lr_adamw,samples_per_second,seconds,run\n"


def plot(*arguments: object, cwd=ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / "plot.py", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def drawn(tmp_path):
    """drawn(**{name: text of its csv}) is the picture of what lies in tmp_path then."""

    def draw(**texts: str) -> ElementTree.Element:
        for name, text in texts.items():
            (tmp_path / f"{name}.csv").write_text(text)
        result = plot(tmp_path)
        assert result.stdout == f"Drawn: {tmp_path}/metrics.svg\n", result.stderr
        return ElementTree.parse(tmp_path / "metrics.svg").getroot()

    return draw


def points(picture, number: int) -> list[tuple[float, float]]:
    line = list(picture.iter(f"{SVG}polyline"))[number]
    return [tuple(map(float, point.split(","))) for point in line.get("points").split()]


def legends(picture) -> list[str]:
    texts = picture.iter(f"{SVG}text")
    return [text.text for text in texts if "legend" in (text.get("class") or "")]


def test_a_run_that_was_stopped_and_went_on_is_drawn_with_a_mark(corpus, tmp_path):
    directory = tmp_path / "checkpoints"

    def train(run: t.Run) -> None:
        def log(original=run.log, **values) -> None:
            original(**values)
            if run.step + 1 == 7:
                ask_to_leave(run)

        run.log = log
        t.train(run)

    where = ["--checkpoint-dir", directory]
    schedule = [*TINY, *"--steps 20 --log-every 1 --eval-every 10".split()]
    assert session("--data", corpus, *where, *schedule, train=train, **t.OPTIONS) == 143
    assert session("--resume", "latest", *where) == 0
    emergency = directory / "emergency_exit"
    state = t.load_checkpoint(emergency / "emergency_step_7.pt")
    # Of another run.
    t.save_checkpoint({**state, "run_id": "0123456789ab"}, emergency / "emergency_step_9.pt")
    (emergency / "emergency_step_11.pt").write_text("damaged")
    result = plot(cwd=tmp_path)
    assert result.stdout == "Drawn: checkpoints/metrics.svg\n", result.stderr
    picture = ElementTree.parse(directory / "metrics.svg").getroot()
    assert len(points(picture, 0)) == 20 and len(list(picture.iter(f"{SVG}circle"))) == 2
    [mark] = [line for line in picture.iter(f"{SVG}line") if "mark" in line.get("class")]
    assert mark.find(f"{SVG}title").text == "stopped at step 7"
    assert float(mark.get("x1")) == points(picture, 0)[6][0]
    assert re.fullmatch(r"checkpoints/metrics.csv, [0-9,]+ samples/s", legends(picture)[0])


def test_a_directory_shows_all_its_runs_that_have_rows(drawn, tmp_path):
    """Those of one file are told apart by their ids; a row that was cut short is none."""
    two = "10,0,5,,1,,1,aaaaaaaaaaaa\n5,0,9,,1,,1,bbbbbbbbbbbb\n20,0,2,,1,,1,aaaaaaaaaaaa\n30,0"
    one = HEADER + "10,0,3,,1,1,1,c\n"
    picture = drawn(metrics=HEADER + two, metrics_2=HEADER, metrics_10=one, metrics_3=one)
    assert legends(picture) == [
        f"{tmp_path}/metrics.csv (aaaaaa)",
        f"{tmp_path}/metrics.csv (bbbbbb)",
        f"{tmp_path}/metrics_3.csv, 1 samples/s",
        f"{tmp_path}/metrics_10.csv, 1 samples/s",
    ]
    assert [len(points(picture, number)) for number in (0, 1)] == [2, 1]


def test_every_value_has_a_chart_of_its_name(drawn):
    """Whatever a script logs and evaluates: training is a line, evaluations are dots."""
    values = "grad_norm,loss,a & b,val_loss,val_accuracy,lr_adamw,samples_per_second"
    rows = "10,0,1,2,3,,,1e-3,7,1,x\n20,0,1.5,1,3,2,0.25,1e-3,7,2,x\n30,0,1,1,3,,,1e-3,7,2,x\n"
    picture = drawn(metrics=f"step,epoch,{values},seconds,run\n{rows}")
    charts = {}
    for chart in picture.findall(f"{SVG}g"):
        [name] = [text.text for text in chart.iter(f"{SVG}text") if text.get("class") == "name"]
        dots = [dot.find(f"{SVG}title").text for dot in chart.findall(f"{SVG}circle")]
        charts[name] = len(chart.findall(f"{SVG}polyline")), dots
    assert charts == {
        "loss": (1, ["step 20: val_loss 2.0000"]),
        "grad_norm": (1, []),
        "a & b": (1, []),
        "accuracy": (0, ["step 20: val_accuracy 0.2500"]),
    }
    assert list(charts)[0] == "loss"


def test_several_runs_lie_over_each_other_to_one_scale(tmp_path):
    for name, losses in (("a", [5, 4, 3, 2]), ("b & <c>", [5, 3, "nan", 1])):
        (tmp_path / name).mkdir()
        rows = [f"{i}0,0,{x},{x if i % 2 else ''},1,100,1,x\n" for i, x in enumerate(losses, 1)]
        (tmp_path / name / "metrics.csv").write_text(HEADER + "".join(rows))
    both = tmp_path / "both.svg"
    plot(tmp_path / "a", tmp_path / "b & <c>" / "metrics.csv", "-o", both).check_returncode()
    picture = ElementTree.parse(both).getroot()
    a, b = points(picture, 0), points(picture, 1)
    # y grows downwards; a NaN is left out.
    assert a[0] == b[0] and a[3][0] == b[2][0] and a[3][1] < b[2][1] and a[1][1] > a[0][1]
    assert len(list(picture.iter(f"{SVG}circle"))) == 3
    assert legends(picture) == [
        f"{tmp_path / name / 'metrics.csv'}, 100 samples/s" for name in ("a", "b & <c>")
    ]
    assert "prefers-color-scheme: dark" in picture.find(f"{SVG}style").text


def test_a_long_run_is_thinned_and_no_part_of_it_left_out(drawn):
    rows = [f"{step},0,{9 if step == 54_321 else 1},,1,1,1,x\n" for step in range(1, 100_001)]
    line = points(drawn(metrics=HEADER + "".join(rows)), 0)
    assert len(line) == 1000 and len({y for _, y in line}) == 2


UNDRAWN = [
    (None, "No such file"),
    ("a,b\n1,2\n", "no metrics.csv of this program"),
    (HEADER, "no rows yet"),
    (HEADER + "x,0,y,,,,,x\n", "invalid literal"),
    (HEADER + f"{'9' * 400},0,3,,1,1,1,x\n", "do not rise in line 2"),
    (HEADER + "5,0,nan,,1,1,1,x\n", "nothing in it yet"),
    (HEADER + f"5,0,{'3' * 200_000},,1,1,1,x\n", "field larger"),
]


@pytest.mark.parametrize("text, message", UNDRAWN)
def test_what_cannot_be_drawn_is_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "metrics.csv").write_text(text)
    result = plot(tmp_path)
    wanted = f"error: {re.escape(str(tmp_path))}.*{message}.*\n"
    assert result.returncode == 2 and re.fullmatch(wanted, result.stderr)
    assert not (tmp_path / "metrics.svg").exists()


def test_a_picture_never_takes_the_place_of_a_checkpoint(tmp_path):
    (tmp_path / "metrics.csv").write_text(HEADER + "1,0,5,,1,1,1,x\n")
    (tmp_path / "final.pt").write_text("precious")
    result = plot(tmp_path, "-o", tmp_path / "final.pt")
    assert result.returncode == 2 and "must end in .svg" in result.stderr
    assert (tmp_path / "final.pt").read_text() == "precious"
