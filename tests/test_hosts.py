"""Several machines train one model: hosts with addresses and processes of their own, two ranks on each."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import MODES, ROOT, assert_same_run, finish, saved_path, wait_until
from ranks import OPTIONS, final

import train_graceful as t

pytestmark = pytest.mark.cluster

# Seconds after which a host that answers nothing is given up: in them no host here gets as little of the CPUs.
SILENCE = 8


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


MINE = '''
import torch
from torch import nn
import train_graceful as tg

def train(run):
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    run.data(torch.utils.data.TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)))
    model = run.model(nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.GELU(), nn.Linear(16, 1)))
    optimizer = run.keep(optimizer=torch.optim.AdamW(model.parameters(), run.options.lr))
    for inputs, targets in run.batches():
        loss = (model(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss)

if __name__ == "__main__":
    tg.main(train, lr=0.01, batch_size=8, steps=8)
'''


@pytest.mark.parametrize(
    "model, way",
    [
        ("built-in", "plain"),
        ("built-in", "--shard"),
        ("of one's own", "plain"),
        ("of one's own", "--shard"),
    ],
)
def test_two_hosts_are_left_from_either_and_go_on_as_the_same_run(hosts, forty_windows, tmp_path, whole, model, way):
    """q on the first, SIGTERM to the torchrun of the second; then on both again, and as 1, 2 and 4 processes of one."""
    if not whole and (model, way) != ("of one's own", "--shard"):
        pytest.skip("the whole of it is a campaign")
    environment, options, steps = {}, [*OPTIONS, *MODES["geometric"], "--data", forty_windows], 30
    if model != "built-in":
        (tmp_path / "mine.py").write_text(MINE)
        environment, options = {"SCRIPT": tmp_path / "mine.py"}, ["--log-every", 1]
        steps = 80
    shard, directory = ["--shard"] * (way == "--shard"), tmp_path / "ck"
    often = ["--save-every", 10**6, "--eval-every", 50]
    fresh = [*options, *shard, "--steps", steps, *often]
    first, second = both(hosts, *fresh, "--checkpoint-dir", directory, **environment)
    first.expect("step [0-9]+/")
    first.send("q\n")
    first.expect("Exit requested")
    assert codes([first, second]) == [0, 0] and second.before == ""
    assert hosts[0].pids() == hosts[1].pids() == []
    step, path = int(re.search(r"Completed Steps: (\d+)", first.before)[1]), saved_path(first.before)
    assert t.load_checkpoint(path)["step"] == step < steps
    assert "NNODES=2 RENDEZVOUS=host1:29500 " in resumed(first.before)
    assert resumed(first.before).endswith(f" 2 --resume {path}")

    children = both(hosts, "--resume", path, *shard, **environment)
    children[0].expect("step [0-9]+/")
    os.kill(hosts[1].pids()[0], signal.SIGTERM)
    assert codes(children) == [143, 143]
    path = saved_path(children[0].before)
    state = t.load_checkpoint(path)
    assert step < state["step"] < steps and state["exit_reason"] == "signal_SIGTERM"

    assert codes(both(hosts, "--resume", path, *shard, "--checkpoint-dir", tmp_path / "hosts", **environment)) == [0, 0]
    alone = {"NNODES": 1, **environment}
    sizes = (1, 2, 4) if whole else ()
    for size in sizes:
        some = shard if size > 1 else []
        child = hosts[0].train("--resume", path, *some, "--checkpoint-dir", tmp_path / str(size), size=size, **alone)
        assert codes([child]) == [0], child.before
    whole = hosts[0].train(*fresh, "--checkpoint-dir", tmp_path / "whole", size=4, **alone)
    assert codes([whole]) == [0]
    assert_same_run(tmp_path / "hosts", tmp_path / "whole")
    assert all(final(tmp_path / str(size))["step"] == steps for size in sizes)
    if 4 in sizes:
        assert_same_run(tmp_path / "4", tmp_path / "whole")


def test_torchruns_own_variables_say_where_the_machines_meet(hosts, forty_windows, tmp_path):
    options = [*OPTIONS, "--steps", 10**6, "--eval-every", 10**6, "--data", forty_windows, "--checkpoint-dir", tmp_path / "ck"]
    meeting = {"PET_NNODES": 2, "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "host1:29500", "NNODES": "", "RENDEZVOUS": ""}
    children = both(hosts, *options, **meeting)
    children[0].expect("4 x cpu")
    children[0].expect("step [0-9]+/")
    children[0].send("q\n")
    assert codes(children) == [0, 0]
    # Where RENDEZVOUS does not say it, the port that they have met at.
    assert re.match(r"NNODES=2 RENDEZVOUS=host1:[0-9]+ \S+train_torchrun.sh 2 --resume ", resumed(children[0].before))


@pytest.mark.parametrize("way", ["plain", "--shard"])
@pytest.mark.parametrize("fault", ["unplugged", "killed", "switched off", "the first switched off"])
def test_what_a_host_that_is_lost_leaves(hosts, forty_windows, tmp_path, whole, way, fault):
    if not whole and (fault, way) not in [("unplugged", "plain"), ("the first switched off", "--shard")]:
        pytest.skip("the whole of it is a campaign")
    directory = tmp_path / "ck"
    options = [*OPTIONS, "--steps", 10**6, "--save-every", 20, "--eval-every", 10**6, "--data", forty_windows, "--checkpoint-dir", directory]
    children = both(hosts, *options, *["--shard"] * (way == "--shard"), SILENCE=SILENCE)
    wait_until((directory / "step_40.pt").exists)
    lost, left = (0, 1) if fault == "the first switched off" else (1, 0)
    if fault == "unplugged":
        hosts[lost].unplug()
    elif fault == "killed":
        for pid in hosts[lost].pids():
            os.kill(pid, signal.SIGKILL)
    else:
        hosts[lost].switch_off()
    began = time.monotonic()
    assert codes([children[left]]) == [1]
    # Those that wait find out at once, others by the silence of their next message.
    assert time.monotonic() - began < 4 * SILENCE + 30
    said = children[left].before
    if fault == "unplugged":
        assert codes([children[lost]]) == [1] and "Newest whole checkpoint: " in children[lost].before
        assert hosts[lost].pids() == []
    assert hosts[left].pids() == []
    assert not [path for path in directory.rglob("*.*") if path.suffix not in (".pt", ".csv", ".lock")]
    newest = t.latest_checkpoint(directory)
    assert f" --resume {newest}" in resumed(said), said
    assert newest.parent.name == ("emergency_exit" if way == "plain" and left == 0 else "ck")


SLOW = MINE.replace("import train_graceful as tg\n", """import os, pathlib, time
import train_graceful as tg

folder, write_parts = pathlib.Path(__file__).parent, tg.write_parts

def slow_parts(*arguments):
    # The test pulls the plug in the middle of the second machine's part.
    if os.environ["RANK"] == "2" and (folder / "pull").exists():
        (folder / "pull").rename(folder / "pulling")
        while (folder / "pulling").exists():
            time.sleep(0.05)
    return write_parts(*arguments)

tg.write_parts = slow_parts
""")


def test_the_link_is_cut_while_the_machines_save(hosts, tmp_path):
    (tmp_path / "mine.py").write_text(SLOW)
    directory = tmp_path / "ck"
    options = ["--shard", "--steps", 10**6, "--save-every", 20, "--checkpoint-dir", directory]
    children = both(hosts, *options, SCRIPT=tmp_path / "mine.py", SILENCE=SILENCE)
    wait_until((directory / "step_40.pt").exists)
    (tmp_path / "pull").touch()
    wait_until((tmp_path / "pulling").exists)
    before = set(directory.glob("*.pt"))
    hosts[1].unplug()
    (tmp_path / "pulling").unlink()
    began = time.monotonic()
    assert codes(children) == [1, 1]
    assert time.monotonic() - began < 4 * SILENCE + 90
    assert hosts[0].pids() == hosts[1].pids() == []
    # What was being written has no name; a checkpoint that stays may be of before, and is whole.
    assert set(directory.glob("*.pt")) <= before
    newest = t.latest_checkpoint(directory)
    for child in children:
        assert f" --resume {newest}" in resumed(child.before), child.before


def test_a_host_that_stands_still_for_a_while_holds_the_other_up_and_nothing_more(hosts, forty_windows, tmp_path, whole):
    options = [*OPTIONS, "--steps", 10**6, "--save-every", 10**6, "--eval-every", 10**6, "--data", forty_windows]
    children = both(hosts, *options, "--checkpoint-dir", tmp_path / "ck", SILENCE=4)
    children[0].expect("step [0-9]+/")
    hosts[1].stand_still()
    # Longer than a host may be silent: this one's system answers.
    time.sleep(20 if whole else 6)
    hosts[1].move_on()
    children[0].expect("step [0-9]+/")
    children[0].expect("step [0-9]+/")
    children[0].send("q\n")
    assert codes(children) == [0, 0]


def test_the_rest_and_a_new_host_go_on_from_the_last_save(hosts, forty_windows, tmp_path):
    directory = tmp_path / "ck"
    options = [*OPTIONS, "--steps", 120, "--save-every", 20, "--eval-every", 10**6, "--data", forty_windows, "--checkpoint-dir", directory]
    children = both(hosts, *options, "--resume", "latest", RESTARTS=2, SILENCE=SILENCE)
    wait_until((directory / "step_20.pt").exists)
    hosts[1].switch_off()
    third = hosts[2].train(*options, "--resume", "latest", RESTARTS=2, SILENCE=SILENCE)
    children[0].expect("Resumed at step")
    assert codes([children[0], third]) == [0, 0]
    assert final(directory)["step"] == 120


@pytest.mark.parametrize("environment, message", [
    ({"NNODES": "2"}, "NNODES=2 needs RENDEZVOUS=host:port"),
    ({"SILENCE": "3"}, "SILENCE=3 is no number of seconds from 4 on"),
])
def test_mistakes_of_several_machines_are_one_line(environment, message):
    script = ROOT / "scripts" / "train_torchrun.sh"
    result = subprocess.run([script, "2"], env={**os.environ, **environment}, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith(message) and result.stderr.count("\n") == 1


@pytest.mark.campaign
def test_two_hosts_write_one_file_on_a_network_file_system(hosts, forty_windows, tmp_path):
    """GlusterFS, a client on each: the ranks' rows of one matrix lie in one page of the file, a hundred times."""
    if missing := [tool for tool in ("glusterd", "gluster", "mount.glusterfs") if shutil.which(tool) is None]:
        pytest.skip(f"needs Debian's packages glusterfs-server and glusterfs-client (missing: {' '.join(missing)})")
    directory = "/mnt/shared/ck"
    for number in (0, 1):
        for folder in ("/var/lib/glusterd", "/var/log/glusterfs", "/run", "/mnt"):
            hosts[number].run("mount", "-t", "tmpfs", "none", folder)
        hosts[number].run("mkdir", "-p", "/run/gluster", "/mnt/bricks", "/mnt/shared")
    hosts[0].spawn("glusterd", "--no-daemon")
    volume = ["gluster", "--mode=script", "volume"]
    wait_until(lambda: subprocess.run([*hosts[0].enter, *volume, "list"], capture_output=True).returncode == 0)
    hosts[0].run(*volume, "create", "shared", "host1:/mnt/bricks", "force")
    hosts[0].run(*volume, "start", "shared")
    for number in (0, 1):
        hosts[number].run("mount", "-t", "glusterfs", "host1:/shared", "/mnt/shared")
    often = ["--steps", 100, "--save-every", 1, "--keep", 200, "--eval-every", 1000]
    options = [*OPTIONS, *often, "--shard", "--data", forty_windows, "--checkpoint-dir", directory]
    children = both(hosts, *options)
    children[0].expect("Training started")
    # The lock of a run holds on the other host too.
    other = hosts[1].train(*OPTIONS, "--data", forty_windows, "--checkpoint-dir", directory, size=1, NNODES=1)
    assert codes([other]) == [2] and "another run" in other.before
    assert codes(children, 300) == [0, 0]
    read = "import glob, train_graceful as t; print([t.load_checkpoint(p)['step'] for p in glob.glob('/mnt/shared/ck/step_*.pt')])"
    for number in (0, 1):
        command = [*hosts[number].enter, "env", f"PYTHONPATH={ROOT}", sys.executable, "-c", read]
        steps = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        assert sorted(steps) == list(range(1, 101))
    for number in (0, 1):
        hosts[number].run("umount", "/mnt/shared")
