"""What scripts/checkpoints.py and scripts/plot.py show is what is there, read and never touched."""

import re
import resource
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import helpers as h
import pytest
import torch

import train_graceful as t

sys.path.insert(0, str(h.ROOT / "scripts"))
import checkpoints

TOOL = [sys.executable, h.ROOT / "scripts" / "checkpoints.py"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    """Of a finished run; one of its files is damaged, others are another program's."""
    directory = tmp_path_factory.mktemp("looking") / "ck"
    words = "--mode geometric --steps 12 --save-every 5 --eval-every 6".split()
    result = h.run("--data", corpus, "--checkpoint-dir", directory, *h.TINY, *words)
    assert result.returncode == 0, result.stderr
    h.flip_a_weight(directory / "step_10.pt", directory / "step_10.pt")
    t.save_checkpoint({"a": torch.ones(3)}, directory / "mine.pt")
    torch.save(torch.nn.Linear(2, 2), directory / "model.pt")
    return directory


@pytest.fixture
def altered(trained, tmp_path):
    """altered(**changes) is a changed final.pt, alone in its directory."""

    def alter(**changes) -> Path:
        path = tmp_path / "altered.pt"
        t.save_checkpoint({**t.load_checkpoint(trained / "final.pt"), **changes}, path)
        return path

    return alter


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """Of a run of somebody's own script: two models, a scheduler, other state."""
    directory = tmp_path_factory.mktemp("mine") / "ck"

    def train(run: t.Run) -> None:
        run.data(range(8), range(4))
        model = run.model(torch.nn.Linear(1, 3))
        critic = run.model(torch.nn.BatchNorm1d(3), name="critic")
        sgd = torch.optim.SGD(model.parameters(), run.options.speed, momentum=0.9)
        optimizer = run.keep(optimizer=sgd)
        run.keep(plan=torch.optim.lr_scheduler.StepLR(optimizer, 1000))
        run.keep(scaler=torch.amp.GradScaler("cpu"), ema=torch.nn.Linear(4, 1))

        def evaluate(batch):
            return {"loss": batch * 1.0, "accuracy": batch * 0.0 + 0.25}

        for batch in run.batches(evaluate, best="max accuracy"):
            optimizer.zero_grad()
            critic(model(batch[:, None].float())).sum().backward()
            optimizer.step()

    h.go(train, directory, speed=0.125, hot=True, batch_size=2, steps=4, eval_every=4)
    return directory


def untouched(directory) -> dict:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in directory.rglob("*")}


@pytest.fixture
def ask(trained, capsys):
    """ask(code, *args) is what the tool prints that ends with that code; it changes nothing."""

    def asked(code: int, *args: object) -> str:
        before = untouched(trained)
        assert checkpoints.main([*map(str, args)]) == code
        assert untouched(trained) == before
        output = capsys.readouterr()
        text = output.out + output.err
        assert code == 0 or text.startswith("error: ") and text.count("\n") == 1, text
        return text

    handlers = [(signum, signal.getsignal(signum)) for signum in (signal.SIGINT, signal.SIGTERM)]
    yield asked
    for signum, handler in handlers:
        signal.signal(signum, handler)


# ---- list, show and sample


def rows_of(text: str) -> dict[str, str]:
    """{name: row} of what list prints, in its order."""
    header, *rows = text.splitlines()
    assert header.split() == ["step", "loss", "best", "age", "size", "run", "reason", "checkpoint"]
    return {Path(row.removesuffix(" <- latest").split()[-1]).name: row for row in rows}


def test_list_names_every_checkpoint_and_its_run_and_says_which_are_damaged(ask, trained):
    rows, state = rows_of(ask(0, "list", trained)), t.load_checkpoint(trained / "final.pt")
    assert {*list(rows)[:2]} == {"best.pt", "final.pt"}
    assert list(rows)[2:] == ["step_10.pt", "step_5.pt", "mine.pt", "model.pt"]
    loss, best = state["metrics"]["smooth_loss"], state["best"]["value"]
    assert rows["final.pt"].split()[:3] == ["12", f"{loss:.4f}", f"{best:.4f}"]
    reasons = {"final.pt": "completed", "step_5.pt": "periodic", "step_10.pt": "damaged"}
    for name, reason in reasons.items():
        assert f" {state['run_id'][:6]}  {reason} " in rows[name]
    assert " of another program " in rows["mine.pt"] and " damaged " in rows["model.pt"]


def test_latest_is_whole_and_of_this_program_for_list_show_and_sample(ask, trained, tmp_path):
    shutil.copy(trained / "step_5.pt", tmp_path)
    shutil.copy(trained / "step_10.pt", tmp_path)
    state, where = t.load_checkpoint(trained / "final.pt"), ["--checkpoint-dir", tmp_path]
    t.save_checkpoint({**state, "format_version": 4, "step": 99}, tmp_path / "step_99.pt")
    [marked] = [row for row in ask(0, "list", tmp_path).splitlines() if "<- latest" in row]
    assert "step_5.pt <- latest" in marked, "step_10.pt is damaged"
    text = ask(0, "show", *where)
    assert text == ask(0, "show", "latest", *where) and f"Checkpoint:  {tmp_path}/step_5.pt" in text
    assert "Skipped " in text and "step_99.pt: not a checkpoint of this program" in text
    assert "the " in ask(0, "sample", *where, "--prompt", "the ")


# Of a run of the built-in program, and of the other one.
BUILT_IN = """
Scheduler: rotation: at step 12
--mode geometric
--epochs none (default)
"""
OF_MINE = """
Best: max accuracy 0.2500 at step 4
Evaluation: loss 1.5000 at step 4
Model: model: 6 numbers in 2 tensors
Model: ema: 5 numbers in 2 tensors
Model: critic: 13 numbers in 5 tensors
Optimizer: optimizer: SGD, 2 tensors, learning rate 0.125
Scheduler: plan: at step 0
State: scaler: 5 other values
Loop: gradients: 6 numbers in 2 tensors
--speed 0.125
--hot True
"""


def test_show_prints_what_the_checkpoint_of_any_script_holds(ask, trained, mine):
    for directory, wanted in ((trained, BUILT_IN), (mine, OF_MINE)):
        path = directory / "final.pt"
        state, text = t.load_checkpoint(path), ask(0, "show", path)
        rows = {" ".join(line.split()) for line in text.splitlines()}
        said = {*wanted.strip().splitlines(), f"Saved: {state['saved_at']} (completed)"}
        assert said <= rows, text
        assert ("Loss:" in text) == ("default" in text) == (directory == trained)


def test_sample_always_writes_the_same_text_as_the_model_predicts_it(ask, trained, capsys):
    names = ("step_5.pt", "step_5.pt", "final.pt")
    texts = [ask(0, "sample", trained / name, "--prompt", "the quick ") for name in names]
    assert all(text.startswith("the quick ") for text in texts)
    assert texts[0] == texts[1] != texts[2] and len(texts[0].encode()) > checkpoints.SAMPLE_BYTES
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


def test_mistakes(ask, trained, tmp_path):
    foreign = trained / "mine.pt"
    for words, said in (
        (["list", tmp_path], "no checkpoints"),
        (["list", foreign], f"{foreign} is a file; show {foreign}"),
        (["show", trained], "is a directory of checkpoints; its latest is"),
        (["show", trained / "step_10.pt"], "damaged checkpoint (record"),
        (["show", "latst"], "No such file or directory; scripts/checkpoints.py list shows what"),
        (["sample", "--checkpoint-dir", tmp_path], "no checkpoint there"),
        (["sample", foreign], f"error: {foreign}: sample works for the built-in model alone"),
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


def test_sizes_that_are_not_the_models_are_one_line_and_take_no_memory(ask, trained, altered):
    config = t.load_checkpoint(trained / "final.pt")["config"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    large = {"layers": 10**12}, {"dim": 10**12}, {"dim": 2**12}
    for change in (*large, {"heads": 3}, {"mode": "standard"}):
        ask(2, "sample", altered(config={**config, **change}))
    # In KiB: two matrices of that width have as many.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 2**17


def test_an_output_that_is_full_or_closed_is_no_traceback(trained):
    command, said = [*TOOL, "list", trained], {"stderr": subprocess.PIPE, "text": True}
    with open("/dev/full", "w") as full, h.forked(command, stdout=full, **said) as process:
        assert process.stderr.read() == "error: standard output: No space left on device\n"
    with h.forked(command, stdout=subprocess.PIPE, **said) as closed:
        closed.stdout.close()
        assert closed.stderr.read() == ""
    assert (process.returncode, closed.returncode) == (2, 141)


# ---- plot

SVG = "{http://www.w3.org/2000/svg}"
HEADER = "step,epoch,loss,val_loss,lr_adamw,samples_per_second,seconds,run\n"


def plot(*arguments: object, cwd=h.ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, h.ROOT / "scripts" / "plot.py", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def drawn(folder: Path, **texts: str) -> ElementTree.Element:
    """The picture of a folder with these {name: text of its csv}."""
    for name, text in texts.items():
        (folder / f"{name}.csv").write_text(text)
    result = plot(folder)
    assert result.stdout == f"Drawn: {folder}/metrics.svg\n", result.stderr
    return ElementTree.parse(folder / "metrics.svg").getroot()


def points(picture, number: int) -> list[tuple[float, float]]:
    line = list(picture.iter(f"{SVG}polyline"))[number]
    return [tuple(map(float, point.split(","))) for point in line.get("points").split()]


def legends(picture) -> list[str]:
    texts = picture.iter(f"{SVG}text")
    return [text.text for text in texts if "legend" in (text.get("class") or "")]


def test_a_run_that_was_stopped_and_went_on_is_drawn_with_a_mark(tmp_path):
    directory = tmp_path / "checkpoints"
    h.go(h.learning(), directory, stop=7)
    h.resume(h.learning(), directory)
    result = plot(cwd=tmp_path)
    assert result.stdout == "Drawn: checkpoints/metrics.svg\n", result.stderr
    picture = ElementTree.parse(directory / "metrics.svg").getroot()
    assert len(points(picture, 0)) == 12
    marks = [line for line in picture.iter(f"{SVG}line") if "mark" in line.get("class")]
    assert {mark.find(f"{SVG}title").text for mark in marks} == {"stopped at step 7"}
    assert float(marks[0].get("x1")) == points(picture, 0)[6][0]
    assert re.fullmatch(r"checkpoints/metrics.csv, [0-9,]+ samples/s", legends(picture)[0])


def test_a_directory_shows_all_its_runs_that_have_rows(tmp_path):
    """Those of one file are told apart by their ids; a row that was cut short is none."""
    two = "10,0,5,,1,,1,aaaaaaaaaaaa\n5,0,9,,1,,1,bbbbbbbbbbbb\n20,0,2,,1,,1,aaaaaaaaaaaa\n30,0"
    one = HEADER + "10,0,3,,1,1,1,c\n"
    picture = drawn(tmp_path, metrics=HEADER + two, metrics_2=HEADER, metrics_10=one)
    assert legends(picture) == [
        f"{tmp_path}/metrics.csv (aaaaaa)",
        f"{tmp_path}/metrics.csv (bbbbbb)",
        f"{tmp_path}/metrics_10.csv, 1 samples/s",
    ]
    assert [len(points(picture, number)) for number in (0, 1)] == [2, 1]


def test_every_value_has_a_chart_of_its_name(tmp_path):
    """Whatever a script logs and evaluates: training is a line, evaluations are dots."""
    values = "grad_norm,loss,a & b,val_loss,val_accuracy"
    rows = "10,1,2,3,,,x\n20,1.5,1,3,2,0.25,x\n"
    picture = drawn(tmp_path, metrics=f"step,{values},run\n{rows}")
    charts = {}
    for chart in picture.findall(f"{SVG}g"):
        [name] = [text.text for text in chart.iter(f"{SVG}text") if text.get("class") == "name"]
        dots = [dot.find(f"{SVG}title").text for dot in chart.findall(f"{SVG}circle")]
        charts[name] = len(chart.findall(f"{SVG}polyline")), dots
    assert list(charts.items()) == [
        ("loss", (1, ["step 20: val_loss 2.0000"])),
        ("grad_norm", (1, [])),
        ("a & b", (1, [])),
        ("accuracy", (0, ["step 20: val_accuracy 0.2500"])),
    ]


def test_what_cannot_be_drawn_is_one_line(tmp_path):
    for text, message in (
        (None, "No such file"),
        ("a,b\n1,2\n", "no metrics.csv of this program"),
        (HEADER, "no rows yet"),
        (HEADER + f"{'9' * 400},0,3,,1,1,1,x\n", "do not rise in line 2"),
    ):
        if text is not None:
            (tmp_path / "metrics.csv").write_text(text)
        result = plot(tmp_path)
        wanted = f"error: {re.escape(str(tmp_path))}.*{message}.*\n"
        assert result.returncode == 2 and re.fullmatch(wanted, result.stderr)
    assert not (tmp_path / "metrics.svg").exists()
    (tmp_path / "metrics.csv").write_text(HEADER + "1,0,5,,1,1,1,x\n")
    result = plot(tmp_path, "-o", tmp_path / "final.pt")
    assert result.returncode == 2 and "must end in .svg" in result.stderr
