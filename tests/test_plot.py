"""scripts/plot.py: what metrics.csv says is what the picture shows."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from helpers import ROOT, TINY, ask_to_leave, session

import train_graceful as t

SVG = "{http://www.w3.org/2000/svg}"
HEADER = "step,epoch,loss,val_loss,lr_adamw,samples_per_second,seconds,run\n"


def plot(*arguments: object, cwd=ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "plot.py"), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
    )


def points(picture, number: int) -> list[tuple[float, float]]:
    line = list(picture.iter(f"{SVG}polyline"))[number]
    return [tuple(map(float, point.split(","))) for point in line.get("points").split()]


def legends(picture) -> list[str]:
    return [
        text.text for text in picture.iter(f"{SVG}text") if "legend" in (text.get("class") or "")
    ]


def test_a_run_that_was_stopped_and_went_on_is_drawn_with_a_mark(corpus, tmp_path):
    directory = tmp_path / "checkpoints"

    def train(run: t.Run, stop: int | None) -> None:
        def batch_then_leave(step: int) -> None:
            if step == stop:
                ask_to_leave(run)

        original = run.log
        run.log = lambda **values: (original(**values), batch_then_leave(run.step + 1))
        t.train(run)

    options = (
        "--data",
        corpus,
        "--checkpoint-dir",
        directory,
        *TINY,
        "--steps",
        20,
        "--log-every",
        1,
        "--eval-every",
        10,
    )
    assert session(*options, train=lambda run: train(run, 7), **t.OPTIONS) == 143
    assert session("--resume", "latest", "--checkpoint-dir", directory) == 0
    state = t.load_checkpoint(directory / "emergency_exit" / "emergency_step_7.pt")
    t.save_checkpoint(
        {**state, "run_id": "0123456789ab"}, directory / "emergency_exit" / "emergency_step_9.pt"
    )  # of another run
    (directory / "emergency_exit" / "emergency_step_11.pt").write_text("damaged")
    result = plot(cwd=tmp_path)
    assert result.returncode == 0 and result.stdout == "Drawn: checkpoints/metrics.svg\n", (
        result.stderr
    )
    picture = ElementTree.parse(directory / "metrics.svg").getroot()
    assert len(points(picture, 0)) == 20 and len(list(picture.iter(f"{SVG}circle"))) == 2
    [mark] = [line for line in picture.iter(f"{SVG}line") if "mark" in line.get("class")]
    assert (
        mark.find(f"{SVG}title").text == "stopped at step 7"
        and float(mark.get("x1")) == points(picture, 0)[6][0]
    )
    assert re.fullmatch(r"checkpoints/metrics.csv, [0-9,]+ samples/s", legends(picture)[0])


def test_a_directory_shows_all_its_runs_that_have_rows(tmp_path):
    for name, rows in {
        "metrics": "10,0,5,,1,1,1,a\n20,0,4,,1,1,1,a\n30,0",
        "metrics_2": "",
        "metrics_10": "10,0,3,,1,1,1,c\n",
        "metrics_3": "10,0,2,,1,1,1,b\n",
    }.items():
        (tmp_path / f"{name}.csv").write_text(HEADER + rows)
    assert plot(tmp_path).stdout == f"Drawn: {tmp_path}/metrics.svg\n"
    picture = ElementTree.parse(tmp_path / "metrics.svg").getroot()
    assert legends(picture) == [
        f"{tmp_path / name}, 1 samples/s"
        for name in ("metrics.csv", "metrics_3.csv", "metrics_10.csv")
    ]
    assert len(points(picture, 0)) == 2  # a row that was cut short is none


def test_the_runs_of_one_file_are_told_apart_by_their_ids(tmp_path):
    rows = "10,0,5,,1,,1,aaaaaaaaaaaa\n20,0,4,3,1,,1,aaaaaaaaaaaa\n5,0,9,,1,,1,bbbbbbbbbbbb\n30,0,2,,1,,1,aaaaaaaaaaaa\n"
    (tmp_path / "metrics.csv").write_text(HEADER + rows)
    assert plot(tmp_path).returncode == 0
    picture = ElementTree.parse(tmp_path / "metrics.svg").getroot()
    assert legends(picture) == [
        f"{tmp_path}/metrics.csv (aaaaaa)",
        f"{tmp_path}/metrics.csv (bbbbbb)",
    ]
    assert [len(points(picture, number)) for number in (0, 1)] == [3, 1]


def test_every_value_has_a_chart_of_its_name(tmp_path):
    """Whatever a script logs and evaluates: training is a line, evaluations are dots."""
    header = "step,epoch,grad_norm,loss,a & b,val_loss,val_accuracy,lr_adamw,samples_per_second,seconds,run\n"
    (tmp_path / "metrics.csv").write_text(
        header
        + "10,0,1,2,3,,,1e-3,7,1,x\n20,0,1.5,1,3,2,0.25,1e-3,7,2,x\n30,0,1,1,3,,,1e-3,7,2,x\n"
    )
    assert plot(tmp_path).returncode == 0
    picture = ElementTree.parse(tmp_path / "metrics.svg").getroot()
    charts = {}
    for chart in picture.findall(f"{SVG}g"):
        [name] = [text.text for text in chart.iter(f"{SVG}text") if text.get("class") == "name"]
        charts[name] = (
            len(chart.findall(f"{SVG}polyline")),
            [dot.find(f"{SVG}title").text for dot in chart.findall(f"{SVG}circle")],
        )
    assert charts == {
        "loss": (1, ["step 20: val_loss 2.0000"]),
        "grad_norm": (1, []),
        "a & b": (1, []),
        "accuracy": (0, ["step 20: val_accuracy 0.2500"]),
    }
    assert list(charts)[0] == "loss"


def test_several_runs_lie_over_each_other_to_one_scale(tmp_path):
    for name, losses in (("a", [5, 4, 3, 2]), ("b & <c>", [5, 3, float("nan"), 1])):
        (tmp_path / name).mkdir()
        rows = "".join(
            f"{10 * (i + 1)},0,{loss},{loss if i % 2 else ''},1e-3,100,{i},{name[0]}\n"
            for i, loss in enumerate(losses)
        )
        (tmp_path / name / "metrics.csv").write_text(HEADER + rows)
    assert (
        plot(
            tmp_path / "a", tmp_path / "b & <c>" / "metrics.csv", "-o", tmp_path / "both.svg"
        ).returncode
        == 0
    )
    picture = ElementTree.parse(tmp_path / "both.svg").getroot()
    a, b = points(picture, 0), points(picture, 1)
    assert (
        a[0] == b[0] and a[3][0] == b[2][0] and a[3][1] < b[2][1] and a[1][1] > a[0][1]
    )  # y grows downwards; a NaN is left out
    assert len(list(picture.iter(f"{SVG}circle"))) == 4
    assert legends(picture) == [
        f"{tmp_path / 'a' / 'metrics.csv'}, 100 samples/s",
        f"{tmp_path / 'b & <c>' / 'metrics.csv'}, 100 samples/s",
    ]
    style = picture.find(f"{SVG}style").text
    assert "prefers-color-scheme: dark" in style


def test_a_long_run_is_thinned_and_no_part_of_it_left_out(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        HEADER
        + "".join(f"{step},0,{9 if step == 54_321 else 1},,1,1,1,x\n" for step in range(1, 100_001))
    )
    assert plot(tmp_path).returncode == 0
    drawn = points(ElementTree.parse(tmp_path / "metrics.svg").getroot(), 0)
    assert len(drawn) == 1000 and len({y for _, y in drawn}) == 2


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "No such file"),
        ("a,b\n1,2\n", "no metrics.csv of this program"),
        (HEADER, "no rows yet"),
        ("step,epoch,loss,val_loss\n1,0,1,1\n", "no metrics.csv of this program"),
        (HEADER + "x,0,y,,,,,x\n", "invalid literal"),
        (HEADER + "0,0,3,,1,1,1,x\n", "do not rise in line 2"),
        (HEADER + f"{'9' * 400},0,3,,1,1,1,x\n", "do not rise"),
        (HEADER + "5,0,nan,,1,1,1,x\n", "nothing in it yet"),
        (HEADER + f"5,0,{'3' * 200_000},,1,1,1,x\n", "field larger"),
        ("\xff\n", "no metrics.csv"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "metrics.csv").write_text(text)
    result = plot(tmp_path)
    assert result.returncode == 2 and re.fullmatch(
        f"error: {re.escape(str(tmp_path))}.*{message}.*\n", result.stderr
    )
    assert not (tmp_path / "metrics.svg").exists()


def test_a_picture_never_takes_the_place_of_a_checkpoint(tmp_path):
    (tmp_path / "metrics.csv").write_text(HEADER + "1,0,5,,1,1,1,x\n")
    (tmp_path / "final.pt").write_text("precious")
    result = plot(tmp_path, "-o", tmp_path / "final.pt")
    assert (
        result.returncode == 2
        and "must end in .svg" in result.stderr
        and (tmp_path / "final.pt").read_text() == "precious"
    )
