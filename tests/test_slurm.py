"""scripts/train_slurm.sh under a real Slurm: warned, saved, requeued, resumed, and the same run.

It is configured and started here, on two hosts of their own.
"""

import functools
import os
import re
import shutil
import subprocess
import sys

import helpers as h
import pytest
from machines import MINE, Hosts

import train_graceful as t

pytestmark = pytest.mark.cluster

# A job's processes share the machine with everything else that is tested.
wait_until = functools.partial(h.wait_until, timeout=180)
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
OPTIONS = "--context 16 --layers 2 --heads 2 --dim 16 --experts 2 --batch-size 4".split()
OPTIONS += "--dropout 0.1 --mode geometric --eval-every 100 --save-every 200".split()

CONFIGURATION = """
ClusterName=test
SlurmctldHost=host1
SlurmUser=root
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
NodeName=host[1-2] CPUs={cores} State=UNKNOWN
PartitionName=main Nodes=host[1-2] Default=YES MaxTime=INFINITE State=UP
"""
MUNGED = """munged --force --foreground --key-file={0}/munge.key --socket={0}/munge.sock
--pid-file={0}/munged.pid --log-file={0}/munged.log --seed-file={0}/seed"""


class Slurm:
    def __init__(self, folder, hosts: Hosts) -> None:
        self.hosts = [hosts[0], hosts[1]]
        for name in ("state", "spool.host1", "spool.host2"):
            (folder / name).mkdir(parents=True)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        text = CONFIGURATION.format(folder=folder, cores=os.cpu_count())
        (folder / "slurm.conf").write_text(text)
        own = {"SLURM_CONF": str(folder / "slurm.conf"), "PYTHON": sys.executable}
        self.environment = {**os.environ, **own}
        self.log = open(folder / "daemons.log", "w")
        self.daemons = [self.start(0, *MUNGED.format(folder).split())]
        wait_until((folder / "munge.sock").exists, self.daemons[0])
        for number, daemon in (0, "slurmctld"), (0, "slurmd"), (1, "slurmd"):
            self.daemons.append(self.start(number, daemon, "-D"))
        idle = functools.partial(self.run, "sinfo", "--noheader", check=False)
        wait_until(lambda: re.search("2 +idle", idle()), self.daemons[1])

    def on(self, number: int, *command: object) -> list[str]:
        """A command, in the repository, on one of the nodes."""
        return [*self.hosts[number].enter, "env", f"--chdir={h.ROOT}", *map(str, command)]

    def start(self, number: int, *command: str) -> subprocess.Popen:
        streams = {"stdin": subprocess.DEVNULL, "stdout": self.log, "stderr": self.log}
        return subprocess.Popen(self.on(number, *command), env=self.environment, **streams)

    def run(self, *command: object, check: bool = True) -> str:
        how = {"env": self.environment, "capture_output": True, "text": True}
        return subprocess.run(self.on(0, *command), check=check, **how).stdout

    def submit(self, log, *arguments: object, limit="--nodes=1") -> str:
        """The job's number."""
        words = ["sbatch", "--parsable", "--time=10", limit, f"--output={log}"]
        return self.run(*words, "scripts/train_slurm.sh", *arguments).strip()

    def state(self, job: str) -> str:
        return re.search(r"JobState=(\w+)", self.run("scontrol", "show", "job", job))[1]

    def requeued(self, job: str, log, directory):
        """Warned as before the end of its time it has gone back into the queue; its checkpoint."""
        self.run("scancel", "--signal=USR1", job)
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
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs Debian's slurm-wlm and munge (missing: {missing})")
    folder = tmp_path_factory.mktemp("slurm")
    hosts = Hosts(folder)
    slurm = Slurm(folder, hosts)
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


def test_a_job_on_two_nodes_is_requeued_and_ends_as_the_same_run(slurm, ended, job, tmp_path):
    log, options = tmp_path / "job.log", job("--steps", 60, "--shard")
    number = slurm.submit(log, *options, limit="--nodes=2")
    wait_until(logged(log, "Training started"))
    emergency = slurm.requeued(number, log, tmp_path / "ck")
    slurm.release(number)
    wait_until(lambda: slurm.state(number) == "COMPLETED")
    said, step = log.read_text(), t.load_checkpoint(emergency)["step"]
    assert said.count("2 x cpu") == 2 and f"Resumed at step {step} of 60" in said
    ended("whole", 2, *options)
    h.assert_same_run(tmp_path / "ck", tmp_path / "whole")


def test_a_cancelled_job_saves_and_stays_away(slurm, job, tmp_path):
    log = tmp_path / "job.log"
    number = slurm.submit(log, *job("--steps", 10**6))
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
    monkeypatch.setitem(slurm.environment, "NPROC", "2")
    log, directory = tmp_path / "job.log", tmp_path / "ck"
    number = slurm.submit(log, "--steps", 10**6, "--checkpoint-dir", directory)
    wait_until(logged(log, "step 10/"))
    emergency = slurm.requeued(number, log, directory)
    slurm.release(number)
    wait_until(logged(log, f"from {emergency}"))
    slurm.cancel(number)


def test_each_task_of_an_array_has_a_run_of_its_own(slurm, job, tmp_path):
    words = job("--steps", 10**6, "--seed", "%a")
    number = slurm.submit(tmp_path / "job_%a.log", *words, limit="--array=3-4")
    logs = [tmp_path / f"job_{task}.log" for task in (3, 4)]
    for log in logs:
        wait_until(logged(log, "step 10/"))
    slurm.requeued(f"{number}_4", logs[1], tmp_path / "ck" / "4")
    # Task 4 was the last and has the array's own number: its way back is not the other's.
    assert slurm.state(f"{number}_3") == "RUNNING"
    slurm.cancel(number)
    assert logs[0].read_text().count("Training started") == 1
    for task, reason in ((3, "signal_SIGTERM"), (4, "signal_SIGUSR1")):
        [emergency] = (tmp_path / "ck" / str(task) / "emergency_exit").iterdir()
        state = t.load_checkpoint(emergency)
        assert state["exit_reason"] == reason and state["config"]["seed"] == task
