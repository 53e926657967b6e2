"""scripts/train_slurm.sh under a real Slurm: warned, saved, requeued, resumed, and the same run.

It is configured and started here, on one node, this machine, or on two hosts of their own.
"""

import functools
import os
import re
import shutil
import socket
import subprocess

import pytest
from helpers import ROOT, assert_same_run, finish, wait_until
from machines import MINE, Hosts

import train_graceful as t

pytestmark = pytest.mark.cluster

# A job's processes share the machine with everything else that is tested.
wait_until = functools.partial(wait_until, timeout=180)
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
OPTIONS = "--context 16 --layers 2 --heads 2 --dim 16 --experts 2 --batch-size 4".split()
OPTIONS += "--dropout 0.1 --mode geometric --eval-every 100 --save-every 200".split()

CONFIGURATION = """
ClusterName=test
SlurmctldHost={controller}
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthInfo=socket={folder}/munge.sock
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=sched_interval=1
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""
MUNGED = """munged --force --foreground --key-file={0}/munge.key --socket={0}/munge.sock
--pid-file={0}/munged.pid --log-file={0}/munged.log --seed-file={0}/seed"""


class Slurm:
    def __init__(self, folder, hosts=None) -> None:
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        if missing or os.getuid():
            pytest.skip(f"needs root, and Debian's slurm-wlm and munge (missing: {missing})")
        self.hosts = [hosts[0], hosts[1]] if hosts else []
        nodes = {host.name: host.address for host in self.hosts}
        nodes = nodes or {socket.gethostname(): "127.0.0.1"}
        for name in ("state", *(f"spool.{name}" for name in nodes)):
            (folder / name).mkdir(parents=True)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            second.bind(("127.0.0.1", 0))
            ports = first.getsockname()[1], second.getsockname()[1]
        controller = next(f"{name}({address})" for name, address in nodes.items())
        of = {"folder": folder, "ports": ports, "controller": controller, "names": ",".join(nodes)}
        lines = [
            f"NodeName={name} NodeAddr={address} CPUs={os.cpu_count()} State=UNKNOWN"
            for name, address in nodes.items()
        ]
        (folder / "slurm.conf").write_text("\n".join(lines) + CONFIGURATION.format(**of))
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "NPROC": "2"}
        self.log = open(folder / "daemons.log", "w")
        self.daemons = [self.start(*MUNGED.format(folder).split())]
        wait_until((folder / "munge.sock").exists, self.daemons[0])
        self.daemons.append(self.start("slurmctld", "-D"))
        self.daemons += [self.start("slurmd", "-D", on=number) for number in range(len(nodes))]
        idle = f"{len(nodes)} +idle"
        answer = functools.partial(self.run, "sinfo", "--noheader", check=False)
        wait_until(lambda: re.search(idle, answer()), self.daemons[1])

    def on(self, number: int, *command: object) -> list[str]:
        """A command, in the repository, on one of the nodes."""
        enter = [*self.hosts[number].enter, "env", f"--chdir={ROOT}"] if self.hosts else []
        return [*enter, *map(str, command)]

    def start(self, *command: str, on: int = 0) -> subprocess.Popen:
        streams = {"stdin": subprocess.DEVNULL, "stdout": self.log, "stderr": self.log}
        return subprocess.Popen(self.on(on, *command), env=self.environment, **streams)

    def run(self, *command: object, check: bool = True) -> str:
        words, settings = self.on(0, *command), {"env": self.environment, "cwd": ROOT}
        result = subprocess.run(words, check=check, capture_output=True, text=True, **settings)
        return result.stdout

    def submit(self, log, *arguments: object, limits=("--time=10",)) -> str:
        """The job's number."""
        words = ["sbatch", "--parsable", *limits, f"--output={log}", "scripts/train_slurm.sh"]
        return self.run(*words, *arguments).strip()

    def state(self, job: str) -> str:
        return re.search(r"JobState=(\w+)", self.run("scontrol", "show", "job", job))[1]

    def warn(self, job: str) -> None:
        """As Slurm does before the end of a job's time."""
        self.run("scancel", "--signal=USR1", job)

    def requeued(self, job: str, log, directory):
        """The checkpoint that a job has saved before it went back into the queue."""
        wait_until(logged(log, "Back into the queue"))
        wait_until(lambda: self.state(job) == "PENDING")
        [emergency] = (directory / "emergency_exit").iterdir()
        assert t.load_checkpoint(emergency)["exit_reason"] == "signal_SIGUSR1"
        return emergency

    def release(self, job: str) -> None:
        """Not after the two minutes that Slurm waits, but when the node has done with the job."""
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+3seconds")

    def cancel(self, job: str) -> None:
        self.run("scancel", job)
        wait_until(lambda: not self.run("squeue", "--noheader"))

    def close(self) -> None:
        self.run("scancel", "--user=root", check=False)
        wait_until(lambda: not self.run("squeue", "--noheader", check=False))
        for daemon in reversed(self.daemons):
            daemon.terminate()
            daemon.wait()
        self.log.close()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    slurm = Slurm(tmp_path_factory.mktemp("slurm") / "slurm")
    yield slurm
    slurm.close()


@pytest.fixture
def two_nodes(tmp_path, spawn):
    hosts = Hosts(tmp_path, spawn)
    slurm = Slurm(tmp_path / "slurm", hosts)
    yield slurm
    slurm.close()
    hosts.close()


@pytest.fixture
def job(tmp_path, forty_windows):
    """job(*options): the command line of a job that saves in ck."""
    in_ck = ["--checkpoint-dir", tmp_path / "ck"]
    return lambda *options: [*OPTIONS, "--data", forty_windows, *in_ck, *options]


def logged(log, text: str):
    return lambda: log.exists() and text in log.read_text()


@pytest.mark.campaign
@pytest.mark.parametrize("before", [60, 20, 90])
def test_a_job_whose_time_ends_is_requeued_and_ends_as_the_same_run(
    slurm, group, job, tmp_path, before
):
    """Warned so many seconds before Slurm's own time limit, which it keeps by the minute."""
    log, options = tmp_path / "job.log", job("--steps", 7_000)
    number = slurm.submit(log, *options, limits=("--time=2", f"--signal=USR1@{before}"))
    slurm.requeued(number, log, tmp_path / "ck")
    released = 0

    def completed() -> bool:
        nonlocal released
        state = slurm.state(number)
        assert state not in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), log.read_text()
        if state == "PENDING" and released < log.read_text().count("Back into the queue"):
            slurm.release(number)
            released += 1
        return state == "COMPLETED"

    wait_until(completed, timeout=600)
    for rank in group(2, *options, "--checkpoint-dir", tmp_path / "whole"):
        rank.terminal.timeout = 600
        rank.finish()
    assert_same_run(tmp_path / "ck", tmp_path / "whole")


@pytest.mark.parametrize(
    "ranks, way",
    [
        (2, ["--shard"]),
        pytest.param(4, ["--shard"], marks=pytest.mark.campaign),
        pytest.param(4, [], marks=pytest.mark.campaign),
    ],
)
def test_a_job_on_two_nodes_is_requeued_and_ends_as_the_same_run(
    two_nodes, job, tmp_path, ranks, way
):
    options = job("--steps", 60, *way)
    two_nodes.environment["NPROC"] = str(ranks // 2)
    log = tmp_path / "job.log"
    number = two_nodes.submit(log, *options, limits=("--time=10", "--nodes=2"))
    wait_until(logged(log, "Training started"))
    two_nodes.warn(number)
    step = t.load_checkpoint(two_nodes.requeued(number, log, tmp_path / "ck"))["step"]
    two_nodes.release(number)
    wait_until(lambda: two_nodes.state(number) == "COMPLETED")
    said = log.read_text()
    assert said.count(f"{ranks} x cpu") == 2 and f"Resumed at step {step} of 60" in said
    words = [*options, "--checkpoint-dir", tmp_path / "whole"]
    finish(two_nodes.hosts[0].train(*words, size=ranks, NNODES=1))
    assert_same_run(tmp_path / "ck", tmp_path / "whole")


def test_a_cancelled_job_saves_and_stays_away(slurm, job, tmp_path):
    log = tmp_path / "job.log"
    number = slurm.submit(log, *job("--shard", "--steps", 10**6))
    wait_until(logged(log, "step 10/"))
    slurm.cancel(number)
    assert slurm.state(number) == "CANCELLED" and "Back into the queue" not in log.read_text()
    [emergency] = (tmp_path / "ck" / "emergency_exit").iterdir()
    assert t.load_checkpoint(emergency)["exit_reason"] == "signal_SIGTERM"


def test_a_job_that_never_began_is_not_requeued_for_what_is_left_of_an_earlier_one(
    slurm, job, tmp_path
):
    directory, log = tmp_path / "ck", tmp_path / "job.log"
    directory.mkdir()
    (directory / "run.lock").write_text("1 elsewhere\n143\n")
    (directory / "final.pt").write_text("another run's")
    number = slurm.submit(log, *job("--dim", 3))
    wait_until(lambda: slurm.state(number) == "FAILED")
    assert "error: --heads has to divide --dim" in log.read_text()
    assert "Back into the queue" not in log.read_text()


def test_a_script_of_ones_own_is_requeued_and_goes_on(slurm, tmp_path, monkeypatch):
    (tmp_path / "beside.py").touch()
    (tmp_path / "mine.py").write_text("import beside" + MINE)
    monkeypatch.setitem(slurm.environment, "SCRIPT", str(tmp_path / "mine.py"))
    log, directory = tmp_path / "job.log", tmp_path / "ck"
    number = slurm.submit(log, "--steps", 10**6, "--checkpoint-dir", directory)
    wait_until(logged(log, "step 10/"))
    slurm.warn(number)
    emergency = slurm.requeued(number, log, directory)
    slurm.release(number)
    wait_until(logged(log, f"from {emergency}"))
    slurm.cancel(number)


def test_each_task_of_an_array_has_a_run_of_its_own(slurm, job, tmp_path, monkeypatch):
    monkeypatch.setitem(slurm.environment, "NPROC", "1")
    words, limits = job("--steps", 10**6, "--seed", "%a"), ("--time=10", "--array=3-4")
    number = slurm.submit(tmp_path / "job_%a.log", *words, limits=limits)
    logs = [tmp_path / f"job_{task}.log" for task in (3, 4)]
    for log in logs:
        wait_until(logged(log, "step 10/"))
    slurm.warn(f"{number}_4")
    slurm.requeued(f"{number}_4", logs[1], tmp_path / "ck" / "4")
    # Task 4 was the last and has the array's own number: its way back is not the other's.
    steps = logs[0].read_text().count("step ")
    wait_until(lambda: logs[0].read_text().count("step ") > steps)
    assert slurm.state(f"{number}_3") == "RUNNING"
    slurm.cancel(number)
    assert logs[0].read_text().count("Training started") == 1
    for task, reason in ((3, "signal_SIGTERM"), (4, "signal_SIGUSR1")):
        [emergency] = (tmp_path / "ck" / str(task) / "emergency_exit").iterdir()
        state = t.load_checkpoint(emergency)
        assert state["exit_reason"] == reason and state["config"]["seed"] == task
