"""Several machines train one model: hosts with processes of their own, two ranks on each."""

import os
import re
import signal
import subprocess
import time

import pytest
from helpers import (
    MODES,
    OPTIONS,
    ROOT,
    STATE_KEYS,
    assert_same,
    assert_same_run,
    final,
    finish,
    saved_path,
    wait_until,
)
from machines import MINE, Hosts

import train_graceful as t

pytestmark = pytest.mark.cluster


@pytest.fixture
def hosts(tmp_path, spawn):
    """hosts[0] and so on: machines of their own; see Hosts."""
    hosts = Hosts(tmp_path, spawn)
    yield hosts
    hosts.close()


@pytest.fixture
def endless(forty_windows, tmp_path) -> list:
    """Options of the built-in program that trains, in ck, until it is asked to leave."""
    options = [*OPTIONS, "--steps", 10**6, "--eval-every", 10**6, "--save-every", 20, "--keep", 3]
    return [*options, "--data", forty_windows, "--checkpoint-dir", tmp_path / "ck"]


def resumed(said: str) -> str:
    """The command that a run has said to go on with."""
    return re.search(r"Resume with: (.+)\r\n", said)[1]


def both(hosts, *options: object, **environment: object) -> list:
    return [hosts[number].train(*options, **environment) for number in (0, 1)]


def codes(children: list, seconds: float = 120) -> list[int]:
    """How the torchruns of the hosts have ended, once no process is left there."""
    for child in children:
        child.timeout = seconds
        finish(child)
    return [child.exitstatus for child in children]


def campaign(*case: object):
    return pytest.param(*case, marks=pytest.mark.campaign)


@pytest.mark.parametrize(
    "model, way, sizes",
    [
        ("of one's own", "--shard", ()),
        campaign("of one's own", "--shard", (1, 2, 4)),
        campaign("of one's own", "plain", (1, 2, 4)),
        campaign("built-in", "--shard", (1, 2, 4)),
        campaign("built-in", "plain", (1, 2, 4)),
    ],
)
def test_two_hosts_are_left_from_either_and_go_on_as_the_same_run(
    hosts, forty_windows, tmp_path, model, way, sizes
):
    """q on the first, SIGTERM to the torchrun of the second; then on both again.

    And as so many processes of one host.
    """
    if model == "built-in":
        own, options, steps = {}, [*OPTIONS, *MODES["geometric"], "--data", forty_windows], 30
    else:
        (tmp_path / "mine.py").write_text(MINE)
        own, options, steps = {"SCRIPT": tmp_path / "mine.py"}, ["--log-every", 1], 80
    shard, directory = ["--shard"] * (way == "--shard"), tmp_path / "ck"
    fresh = [*options, *shard, "--steps", steps, "--save-every", 10**6, "--eval-every", 50]
    first, second = both(hosts, *fresh, "--checkpoint-dir", directory, **own)
    first.expect("step [0-9]+/")
    first.send("q\n")
    first.expect("Exit requested")
    assert codes([first, second]) == [0, 0] and second.before == ""
    assert hosts[0].pids() == hosts[1].pids() == []
    path, said = saved_path(first.before), resumed(first.before)
    step = t.load_checkpoint(path)["step"]
    assert f"Completed Steps: {step}\r" in first.before and step < steps
    assert "NNODES=2 RENDEZVOUS=host1:29500 " in said and said.endswith(f" 2 --resume {path}")

    first, second = both(hosts, "--resume", path, *shard, **own)
    first.expect("step [0-9]+/")
    os.kill(hosts[1].pids()[0], signal.SIGTERM)
    assert codes([first, second]) == [143, 143]
    path = saved_path(first.before)
    state = t.load_checkpoint(path)
    assert step < state["step"] < steps and state["exit_reason"] == "signal_SIGTERM"

    assert codes(both(hosts, "--resume", path, *shard, **own)) == [0, 0]
    whole = tmp_path / "whole"
    words = [*fresh, "--checkpoint-dir", whole]
    assert codes([hosts[0].train(*words, size=4, NNODES=1, **own)]) == [0]
    assert_same_run(directory, whole)
    for size in sizes:
        words = ["--resume", path, *shard[: size - 1], "--checkpoint-dir", tmp_path / str(size)]
        child = hosts[0].train(*words, size=size, NNODES=1, **own)
        assert codes([child]) == [0], child.before
        a, b = final(tmp_path / str(size)), final(whole)
        assert a["step"] == steps
        # The rows before are in the other directory.
        keys = STATE_KEYS if size == 4 else ("step",)
        assert_same({key: a[key] for key in keys}, {key: b[key] for key in keys})


def test_torchruns_own_variables_say_where_the_machines_meet(hosts, endless):
    meeting = {"PET_NNODES": 2, "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "host1:29500"}
    children = both(hosts, *endless, NNODES="", RENDEZVOUS="", **meeting)
    children[0].expect("4 x cpu")
    children[0].expect("step [0-9]+/")
    children[0].send("q\n")
    assert codes(children) == [0, 0]
    # The variables stay the caller's.
    assert re.match(r"\S+train_torchrun.sh 2 --resume /", resumed(children[0].before))


@pytest.mark.parametrize("way", ["plain", "--shard"])
def test_what_a_host_whose_processes_are_killed_leaves(hosts, endless, tmp_path, way):
    directory = tmp_path / "ck"
    children = both(hosts, *endless, *["--shard"] * (way == "--shard"))
    wait_until((directory / "step_40.pt").exists)
    hosts[1].kill(signal.SIGKILL)
    assert codes(children[:1]) == [1]
    assert hosts[0].pids() == hosts[1].pids() == []
    assert {path.suffix for path in directory.rglob("*.*")} == {".pt", ".csv", ".lock"}
    newest = t.latest_checkpoint(directory)
    said = children[0].before
    assert f" --resume {newest}" in resumed(said), said
    assert newest.parent.name == ("emergency_exit" if way == "plain" else "ck")


def test_a_host_that_stands_still_for_a_while_holds_the_other_up_and_nothing_more(
    hosts, endless, whole
):
    children = both(hosts, *endless)
    children[0].expect("step [0-9]+/")
    hosts[1].kill(signal.SIGSTOP)
    # Is not the other's end: this one's system answers.
    time.sleep(20 if whole else 6)
    hosts[1].kill(signal.SIGCONT)
    children[0].expect("step [0-9]+/")
    children[0].expect("step [0-9]+/")
    children[0].send("q\n")
    assert codes(children) == [0, 0]


def test_several_machines_need_a_place_to_meet():
    script = ROOT / "scripts" / "train_torchrun.sh"
    environment = {**os.environ, "NNODES": "2"}
    result = subprocess.run([script, "2"], env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("NNODES=2 needs RENDEZVOUS=host:port")
