"""Several machines train one model: hosts with addresses and processes of their own, two ranks on each."""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pexpect
import pytest
from helpers import (
    MODES,
    OPTIONS,
    ROOT,
    STATE_KEYS,
    assert_same,
    assert_same_run,
    by_script,
    final,
    finish,
    saved_path,
    wait_until,
)

import train_graceful as t

pytestmark = pytest.mark.cluster
TOOLS = ("ip", "unshare", "nsenter", "hostname", "mount")
NETWORK = "10.213.7"


class Host:
    """A network address, a name, a table of processes; the files are this machine's.

    Its process 1 is `init`, which waits; everything on the host ends with it.
    """

    def __init__(self, number: int, switch: int, folder: Path, spawn) -> None:
        self.name, self.address = f"host{number}", f"{NETWORK}.{number}"
        self._spawn, self._spawned = spawn, []
        namespaces = ["--net", "--uts", "--mount", "--pid"]
        alone = ["unshare", *namespaces, "--fork", "--kill-child", "--mount-proc"]
        # Dies with these tests, however they end. No parent waits for what it inherits.
        waits = "import signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print(flush=True); sys.stdin.read()"
        self._unshare = subprocess.Popen(
            [*alone, sys.executable, "-c", waits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._unshare.stdout.readline()
        self.init = int(
            Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children").read_text()
        )
        self.enter = ["nsenter", f"--target={self.init}", "--net", "--uts", "--mount", "--pid"]
        hosts = folder / f"{self.name}.hosts"
        hosts.write_text(
            "127.0.0.1 localhost\n" + "".join(f"{NETWORK}.{n} host{n}\n" for n in range(1, 10))
        )
        plug = f"plug{number}"
        for command in (
            f"ip link add eth0 netns {self.init} type veth peer name {plug} netns {switch}",
            f"nsenter --target={switch} --net ip link set {plug} master switch up",
        ):
            subprocess.run(command.split(), check=True)
        self.run("hostname", self.name)
        self.run("mount", "--bind", hosts, "/etc/hosts")
        self.run("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "lo", "up")
        self.run("ip", "link", "set", "eth0", "up")

    def run(self, *words: object) -> None:
        subprocess.run([*self.enter, *map(str, words)], check=True)

    def spawn(self, *words: object, **environment: object) -> pexpect.spawn:
        """A command in a pseudo-terminal of this host."""
        variables = (f"{name}={value}" for name, value in environment.items())
        command = [*self.enter, "env", *variables, *map(str, words)]
        self._spawned.append(self._spawn(command=command))
        return self._spawned[-1]

    def train(self, *options: object, size: int = 2, **environment: object) -> pexpect.spawn:
        """What scripts/train_torchrun.sh starts, which meets that of another host unless NNODES is 1."""
        together = {"NNODES": 2, "RENDEZVOUS": "host1:29500", "OMP_NUM_THREADS": 1, **environment}
        self._spawned.append(by_script(self._spawn, size, *options, enter=self._go_in, **together))
        return self._spawned[-1]

    def _go_in(self) -> None:
        """For a fork: goes on in a fork of its own, whose parent has its exit code."""
        libc = ctypes.CDLL(None, use_errno=True)
        spaces = [
            os.open(f"/proc/{self.init}/ns/{kind}", os.O_RDONLY)
            for kind in ("net", "uts", "pid", "mnt")
        ]
        for space in spaces:
            if libc.setns(space, 0):
                raise OSError(ctypes.get_errno(), "setns")
            os.close(space)
        if pid := os.fork():
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os._exit(code if code >= 0 else 128 - code)

    def pids(self) -> list[int]:
        """Of the processes that live on this host, but for init."""
        space = os.readlink(f"/proc/{self.init}/ns/pid")
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self.init:
                try:
                    if os.readlink(entry / "ns" / "pid") == space:
                        found.append(int(entry.name))
                except OSError:
                    # It has just ended, or waits to be reaped.
                    continue
        return found

    def stand_still(self) -> None:
        for pid in self.pids():
            os.kill(pid, signal.SIGSTOP)

    def move_on(self) -> None:
        for pid in self.pids():
            os.kill(pid, signal.SIGCONT)

    def unplug(self) -> None:
        self.run("ip", "link", "set", "eth0", "down")

    def switch_off(self) -> None:
        """No packet says good-bye."""
        if self._unshare.poll() is None:
            self.unplug()
            os.kill(self.init, signal.SIGKILL)
            self._unshare.wait()
            self._unshare.stdin.close()
            self._unshare.stdout.close()


class Hosts:
    """hosts[0] and so on, each made when it is first asked for, all on one switch."""

    def __init__(self, folder: Path, spawn) -> None:
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        if missing or os.getuid() or sys.platform != "linux":
            pytest.skip(
                f"hosts of their own need Linux, root and iproute2 (missing: {' '.join(missing) or 'root'})"
            )
        self._folder, self._spawn, self._hosts = folder, spawn, {}
        self._switch = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo; read wait"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        if not self._switch.stdout.readline():
            pytest.skip("this machine lets nobody make namespaces")
        enter = ["nsenter", f"--target={self._switch.pid}", "--net"]
        subprocess.run([*enter, "ip", "link", "add", "switch", "type", "bridge"], check=True)
        subprocess.run([*enter, "ip", "link", "set", "switch", "up"], check=True)

    def __getitem__(self, number: int) -> Host:
        if number not in self._hosts:
            self._hosts[number] = Host(number + 1, self._switch.pid, self._folder, self._spawn)
        return self._hosts[number]

    def close(self) -> None:
        for host in self._hosts.values():
            host.switch_off()
        self._switch.communicate()


@pytest.fixture
def hosts(tmp_path, spawn):
    """hosts[0] and so on: machines of their own; see Hosts."""
    hosts = Hosts(tmp_path, spawn)
    yield hosts
    hosts.close()


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


MINE = """
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
"""


@pytest.mark.parametrize(
    "model, way",
    [
        ("built-in", "plain"),
        ("built-in", "--shard"),
        ("of one's own", "plain"),
        ("of one's own", "--shard"),
    ],
)
def test_two_hosts_are_left_from_either_and_go_on_as_the_same_run(
    hosts, forty_windows, tmp_path, whole, model, way
):
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
    step, path = (
        int(re.search(r"Completed Steps: (\d+)", first.before)[1]),
        saved_path(first.before),
    )
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

    assert codes(both(hosts, "--resume", path, *shard, **environment)) == [0, 0]
    alone = {"NNODES": 1, **environment}
    sizes = (1, 2, 4) if whole else ()
    for size in sizes:
        some = shard if size > 1 else []
        child = hosts[0].train(
            "--resume", path, *some, "--checkpoint-dir", tmp_path / str(size), size=size, **alone
        )
        assert codes([child]) == [0], child.before
    whole = hosts[0].train(*fresh, "--checkpoint-dir", tmp_path / "whole", size=4, **alone)
    assert codes([whole]) == [0]
    assert_same_run(directory, tmp_path / "whole")
    assert all(final(tmp_path / str(size))["step"] == steps for size in sizes)
    if 4 in sizes:
        # The rows before are in the other directory.
        a, b = final(tmp_path / "4"), final(tmp_path / "whole")
        assert_same({key: a[key] for key in STATE_KEYS}, {key: b[key] for key in STATE_KEYS})


def test_torchruns_own_variables_say_where_the_machines_meet(hosts, forty_windows, tmp_path):
    options = [
        *OPTIONS,
        "--steps",
        10**6,
        "--eval-every",
        10**6,
        "--data",
        forty_windows,
        "--checkpoint-dir",
        tmp_path / "ck",
    ]
    meeting = {
        "PET_NNODES": 2,
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": "host1:29500",
        "NNODES": "",
        "RENDEZVOUS": "",
    }
    children = both(hosts, *options, **meeting)
    children[0].expect("4 x cpu")
    children[0].expect("step [0-9]+/")
    children[0].send("q\n")
    assert codes(children) == [0, 0]
    # The variables stay the caller's.
    assert re.match(r"\S+train_torchrun.sh 2 --resume /", resumed(children[0].before))


@pytest.mark.parametrize("way", ["plain", "--shard"])
def test_what_a_host_whose_processes_are_killed_leaves(hosts, forty_windows, tmp_path, way):
    directory = tmp_path / "ck"
    options = [*OPTIONS, "--steps", 10**6, "--save-every", 20, "--eval-every", 10**6]
    options += ["--data", forty_windows, "--checkpoint-dir", directory]
    children = both(hosts, *options, *["--shard"] * (way == "--shard"))
    wait_until((directory / "step_40.pt").exists)
    for pid in hosts[1].pids():
        os.kill(pid, signal.SIGKILL)
    assert codes(children[:1]) == [1]
    assert hosts[0].pids() == hosts[1].pids() == []
    assert {path.suffix for path in directory.rglob("*.*")} == {".pt", ".csv", ".lock"}
    newest = t.latest_checkpoint(directory)
    said = children[0].before
    assert f" --resume {newest}" in resumed(said), said
    assert newest.parent.name == ("emergency_exit" if way == "plain" else "ck")


def test_a_host_that_stands_still_for_a_while_holds_the_other_up_and_nothing_more(
    hosts, forty_windows, tmp_path, whole
):
    options = [
        *OPTIONS,
        "--steps",
        10**6,
        "--save-every",
        10**6,
        "--eval-every",
        10**6,
        "--data",
        forty_windows,
    ]
    children = both(hosts, *options, "--checkpoint-dir", tmp_path / "ck")
    children[0].expect("step [0-9]+/")
    hosts[1].stand_still()
    # Is not the other's end: this one's system answers.
    time.sleep(20 if whole else 6)
    hosts[1].move_on()
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
