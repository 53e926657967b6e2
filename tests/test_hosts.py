"""Several machines train one model: hosts with processes of their own, two ranks on each."""

import os
import re
import signal

import helpers as h
import pytest
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
    options = [*h.OPTIONS, "--steps", 10**6, "--eval-every", 10**6, "--save-every", 20, "--keep", 3]
    return [*options, "--data", forty_windows, "--checkpoint-dir", tmp_path / "ck"]


def resumed(said: str) -> str:
    """The command that a run has said to go on with."""
    return re.search(r"Resume with: (.+)\r\n", said)[1]


def both(hosts, *options: object, **environment: object) -> list:
    return [hosts[number].train(*options, **environment) for number in (0, 1)]


def codes(children: list) -> list[int]:
    """How the torchruns of the hosts have ended, once no process is left there."""
    for child in children:
        child.timeout = 120
        h.finish(child)
    return [child.exitstatus for child in children]


def test_two_hosts_are_left_from_either_and_go_on_as_the_same_run(hosts, tmp_path):
    """q on the first, SIGTERM to the torchrun of the second; then on both again."""
    (tmp_path / "mine.py").write_text(MINE)
    own, directory = {"SCRIPT": tmp_path / "mine.py"}, tmp_path / "ck"
    fresh = "--shard --log-every 1 --steps 80 --save-every 1000 --eval-every 1000".split()
    first, second = both(hosts, *fresh, "--checkpoint-dir", directory, **own)
    first.expect("step [0-9]+/")
    first.send("q\n")
    first.expect("Exit requested")
    assert codes([first, second]) == [0, 0] and second.before == ""
    assert hosts[0].pids() == hosts[1].pids() == []
    path, said = h.saved_path(first.before), resumed(first.before)
    step = t.load_checkpoint(path)["step"]
    assert f"Completed Steps: {step}\r" in first.before and step < 80
    assert "NNODES=2 RENDEZVOUS=host1:29500 " in said and said.endswith(f" 2 --resume {path}")

    first, second = both(hosts, "--resume", path, **own)
    first.expect("step [0-9]+/")
    os.kill(hosts[1].pids()[0], signal.SIGTERM)
    assert codes([first, second]) == [143, 143]
    path = h.saved_path(first.before)
    state = t.load_checkpoint(path)
    assert step < state["step"] < 80 and state["exit_reason"] == "signal_SIGTERM"

    assert codes(both(hosts, "--resume", path, **own)) == [0, 0]
    words = [*fresh, "--checkpoint-dir", tmp_path / "whole"]
    assert codes([hosts[0].train(*words, size=4, NNODES=1, **own)]) == [0]
    h.assert_same_run(directory, tmp_path / "whole")


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
    h.wait_until((directory / "step_40.pt").exists)
    for pid in hosts[1].pids():
        os.kill(pid, signal.SIGKILL)
    assert codes(children[:1]) == [1]
    assert hosts[0].pids() == hosts[1].pids() == []
    assert {path.suffix for path in directory.rglob("*.*")} == {".pt", ".csv", ".lock"}
    newest = t.latest_checkpoint(directory)
    said = children[0].before
    assert f" --resume {newest}" in resumed(said), said
    assert newest.parent.name == ("emergency_exit" if way == "plain" else "ck")
