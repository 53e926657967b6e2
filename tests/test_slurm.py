"""scripts/train_slurm.sh under a real Slurm, configured and started here: one node, this machine, or two hosts of their own."""

import functools
import os
import re
import shutil
import socket
import subprocess

import pytest
from helpers import ROOT, assert_same_run, finish, wait_until

import train_graceful as t

pytestmark = pytest.mark.cluster

# A job's processes share the machine with everything else that is tested.
wait_until = functools.partial(wait_until, timeout=180)
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
OPTIONS = [
    "--context",
    16,
    "--layers",
    2,
    "--heads",
    2,
    "--dim",
    16,
    "--experts",
    2,
    "--batch-size",
    4,
    "--dropout",
    0.1,
    "--mode",
    "geometric",
    "--eval-every",
    100,
    "--save-every",
    200,
]


class Slurm:
    def __init__(self, folder, hosts=None) -> None:
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        if missing or os.getuid():
            pytest.skip(
                f"needs root and Debian's packages slurm-wlm and munge (missing: {' '.join(missing) or 'root'})"
            )
        folder.mkdir()
        self.hosts = [hosts[0], hosts[1]] if hosts else []
        nodes = {host.name: host.address for host in self.hosts} or {
            socket.gethostname(): "127.0.0.1"
        }
        controller = next(iter(nodes))
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            second.bind(("127.0.0.1", 0))
            ports = first.getsockname()[1], second.getsockname()[1]
        (folder / "slurm.conf").write_text(
            "\n".join(
                [
                    "ClusterName=test",
                    f"SlurmctldHost={controller}({nodes[controller]})",
                    "SlurmUser=root",
                    f"SlurmctldPort={ports[0]}",
                    f"SlurmdPort={ports[1]}",
                    f"AuthInfo=socket={folder}/munge.sock",
                    "ProctrackType=proctrack/linuxproc",
                    "TaskPlugin=task/none",
                    "SwitchType=switch/none",
                    "MpiDefault=none",
                    "SelectType=select/cons_tres",
                    "SelectTypeParameters=CR_Core",
                    f"StateSaveLocation={folder}/state",
                    f"SlurmdSpoolDir={folder}/spool.%n",
                    f"SlurmctldPidFile={folder}/ctld.pid",
                    f"SlurmdPidFile={folder}/slurmd.%n.pid",
                    f"SlurmctldLogFile={folder}/ctld.log",
                    f"SlurmdLogFile={folder}/slurmd.%n.log",
                    "ReturnToService=2",
                    "JobAcctGatherType=jobacct_gather/none",
                    "SchedulerParameters=sched_interval=1",
                    *(
                        f"NodeName={name} NodeAddr={address} CPUs={os.cpu_count()} State=UNKNOWN"
                        for name, address in nodes.items()
                    ),
                    f"PartitionName=main Nodes={','.join(nodes)} Default=YES MaxTime=INFINITE State=UP",
                ]
            )
            + "\n"
        )
        (folder / "state").mkdir()
        for name in nodes:
            (folder / f"spool.{name}").mkdir()
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "NPROC": "2"}
        self.log = open(folder / "daemons.log", "w")
        self.daemons = [
            self.start(
                "munged",
                "--force",
                "--foreground",
                f"--key-file={folder}/munge.key",
                f"--socket={folder}/munge.sock",
                f"--pid-file={folder}/munged.pid",
                f"--log-file={folder}/munged.log",
                f"--seed-file={folder}/seed",
            )
        ]
        wait_until((folder / "munge.sock").exists, self.daemons[0])
        self.daemons += [
            self.start("slurmctld", "-D"),
            *(self.start("slurmd", "-D", on=number) for number in range(len(nodes))),
        ]
        idle = f"{len(nodes)} +idle"
        wait_until(
            lambda: re.search(idle, self.run("sinfo", "--noheader", check=False)), self.daemons[1]
        )

    def on(self, number: int, *command: object) -> list[str]:
        """A command, in the repository, on one of the nodes."""
        enter = [*self.hosts[number].enter, "env", f"--chdir={ROOT}"] if self.hosts else []
        return [*enter, *map(str, command)]

    def start(self, *command: str, on: int = 0) -> subprocess.Popen:
        streams = {"stdin": subprocess.DEVNULL, "stdout": self.log, "stderr": self.log}
        return subprocess.Popen(self.on(on, *command), env=self.environment, **streams)

    def run(self, *command: object, check: bool = True) -> str:
        return subprocess.run(
            self.on(0, *command),
            env=self.environment,
            cwd=ROOT,
            check=check,
            capture_output=True,
            text=True,
        ).stdout

    def submit(self, log, *arguments: object, limits=("--time=10",)) -> str:
        """The job's number."""
        return self.run(
            "sbatch", "--parsable", *limits, f"--output={log}", "scripts/train_slurm.sh", *arguments
        ).strip()

    def state(self, job: str) -> str:
        return re.search(r"JobState=(\w+)", self.run("scontrol", "show", "job", job))[1]

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
def two_nodes(hosts, tmp_path):
    slurm = Slurm(tmp_path / "slurm", hosts)
    yield slurm
    slurm.close()


def logged(log, text: str):
    return lambda: log.exists() and text in log.read_text()


@pytest.mark.parametrize("before", [60, 20, 90])
def test_a_job_whose_time_ends_is_requeued_and_ends_as_the_same_run(
    slurm, group, forty_windows, tmp_path, whole, before
):
    """Warned so many seconds before its end; Slurm may do it up to a minute earlier."""
    if not whole and before != 60:
        pytest.skip("the whole of it is a campaign")
    # whole: Slurm's own time limit, which it keeps by the minute; else the signal that it would send.
    limits, steps = (
        (("--time=2", f"--signal=USR1@{before}"), 7_000) if whole else (("--time=10",), 150)
    )
    options = [*OPTIONS, "--steps", steps, "--data", forty_windows]
    log, directory = tmp_path / "job.log", tmp_path / "ck"
    job = slurm.submit(log, *options, "--checkpoint-dir", directory, limits=limits)
    wait_until(logged(log, "step 10/"))
    if not whole:
        slurm.run("scancel", "--signal=USR1", job)
    wait_until(logged(log, "Back into the queue"), timeout=180)
    wait_until(lambda: slurm.state(job) == "PENDING")
    [emergency] = (directory / "emergency_exit").iterdir()
    state = t.load_checkpoint(emergency)
    assert state["exit_reason"] == "signal_SIGUSR1" and 0 < state["step"] < steps
    released = 0

    def completed() -> bool:
        nonlocal released
        assert (state := slurm.state(job)) not in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), (
            log.read_text()
        )
        if state == "PENDING" and released < log.read_text().count("Back into the queue"):
            # Not after the two minutes that Slurm waits, but long enough for the node to have done with the job.
            slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now+3seconds")
            released += 1
        return state == "COMPLETED"

    wait_until(completed, timeout=600)
    assert f"Resumed at step {state['step']} of {steps}" in log.read_text()
    for rank in group(2, *options, "--checkpoint-dir", tmp_path / "whole"):
        rank.terminal.timeout = 600
        rank.finish()
    assert_same_run(directory, tmp_path / "whole")


def test_a_cancelled_job_saves_and_stays_away(slurm, forty_windows, tmp_path):
    log, directory = tmp_path / "job.log", tmp_path / "ck"
    job = slurm.submit(
        log,
        *OPTIONS,
        "--shard",
        "--steps",
        10**6,
        "--data",
        forty_windows,
        "--checkpoint-dir",
        directory,
    )
    wait_until(logged(log, "step 10/"))
    slurm.run("scancel", job)
    wait_until(lambda: not slurm.run("squeue", "--noheader"))
    assert slurm.state(job) == "CANCELLED" and "Back into the queue" not in log.read_text()
    [emergency] = (directory / "emergency_exit").iterdir()
    assert t.load_checkpoint(emergency)["exit_reason"] == "signal_SIGTERM"


def test_a_job_that_never_began_is_not_requeued_for_what_is_left_of_an_earlier_one(
    slurm, forty_windows, tmp_path
):
    directory, log = tmp_path / "ck", tmp_path / "job.log"
    directory.mkdir()
    (directory / "run.lock").write_text("1 elsewhere\n143\n")
    (directory / "final.pt").write_text("another run's")
    job = slurm.submit(
        log, *OPTIONS, "--dim", 3, "--data", forty_windows, "--checkpoint-dir", directory
    )
    wait_until(lambda: slurm.state(job) == "FAILED")
    assert (
        "error: --heads has to divide --dim" in log.read_text()
        and "Back into the queue" not in log.read_text()
    )


def test_a_script_of_ones_own_is_requeued_and_goes_on(slurm, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mydata.py").write_text(
        "import torch\nimages = torch.arange(64.0)[:, None] / 64\n"
    )
    script = tmp_path / "mine" / "mine.py"
    script.write_text(MINE)
    monkeypatch.setitem(slurm.environment, "SCRIPT", str(script))
    log, directory = tmp_path / "job.log", tmp_path / "ck"
    job = slurm.submit(log, "--steps", 10**6, "--checkpoint-dir", directory)
    wait_until(logged(log, "step 10/"))
    slurm.run("scancel", "--signal=USR1", job)
    wait_until(logged(log, "Back into the queue"))
    wait_until(lambda: slurm.state(job) == "PENDING")
    [emergency] = (directory / "emergency_exit").iterdir()
    assert t.load_checkpoint(emergency)["exit_reason"] == "signal_SIGUSR1"
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now+3seconds")
    wait_until(logged(log, f"from {emergency}"))
    slurm.run("scancel", job)
    wait_until(lambda: not slurm.run("squeue", "--noheader"))


@pytest.mark.parametrize("way", ["plain", "--shard"])
def test_a_job_on_two_nodes_is_requeued_and_ends_as_the_same_run(
    two_nodes, forty_windows, tmp_path, whole, way
):
    if not whole and way == "plain":
        pytest.skip("the whole of it is a campaign")
    options = [*OPTIONS, *["--shard"] * (way == "--shard"), "--steps", 60, "--data", forty_windows]
    ranks = 4 if whole else 2
    two_nodes.environment["NPROC"] = str(ranks // 2)
    log, directory = tmp_path / "job.log", tmp_path / "ck"
    job = two_nodes.submit(
        log, *options, "--checkpoint-dir", directory, limits=("--time=10", "--nodes=2")
    )
    wait_until(logged(log, "Training started"))
    two_nodes.run("scancel", "--signal=USR1", job)
    wait_until(logged(log, "Back into the queue"))
    wait_until(lambda: two_nodes.state(job) == "PENDING")
    [emergency] = (directory / "emergency_exit").iterdir()
    state = t.load_checkpoint(emergency)
    assert state["exit_reason"] == "signal_SIGUSR1" and state["step"] < 60
    two_nodes.run("scontrol", "update", f"JobId={job}", "StartTime=now+3seconds")
    wait_until(lambda: two_nodes.state(job) == "COMPLETED", timeout=120)
    assert (
        log.read_text().count(f"{ranks} x cpu") == 2
        and f"Resumed at step {state['step']} of 60" in log.read_text()
    )
    uninterrupted = two_nodes.hosts[0].train(
        *options, "--checkpoint-dir", tmp_path / "whole", size=ranks, NNODES=1
    )
    finish(uninterrupted)
    assert_same_run(directory, tmp_path / "whole")


def test_each_task_of_an_array_has_a_run_of_its_own(slurm, forty_windows, tmp_path):
    options = [
        *OPTIONS,
        "--steps",
        10**6,
        "--data",
        forty_windows,
        "--checkpoint-dir",
        tmp_path / "ck",
        "--seed",
        "%a",
    ]
    slurm.environment["NPROC"] = "1"
    job = slurm.submit(tmp_path / "job_%a.log", *options, limits=("--time=10", "--array=3-4"))
    logs = [tmp_path / f"job_{task}.log" for task in (3, 4)]
    for log in logs:
        wait_until(logged(log, "step 10/"))
    slurm.run("scancel", "--signal=USR1", f"{job}_4")
    wait_until(logged(logs[1], "Back into the queue"))
    wait_until(lambda: slurm.state(f"{job}_4") == "PENDING")
    # Task 4 was the last and has the array's own number: its way back is not the other's.
    steps = logs[0].read_text().count("step ")
    wait_until(lambda: logs[0].read_text().count("step ") > steps)
    assert slurm.state(f"{job}_3") == "RUNNING"
    slurm.run("scancel", job)
    wait_until(lambda: not slurm.run("squeue", "--noheader"))
    slurm.environment["NPROC"] = "2"
    assert logs[0].read_text().count("Training started") == 1
    for task, reason in ((3, "signal_SIGTERM"), (4, "signal_SIGUSR1")):
        [emergency] = (tmp_path / "ck" / str(task) / "emergency_exit").iterdir()
        state = t.load_checkpoint(emergency)
        assert state["exit_reason"] == reason and state["config"]["seed"] == task


MINE = """
import mydata, torch, train_graceful as tg

def train(run):
    run.data(mydata.images)
    model = run.model(torch.nn.Linear(1, 1))
    optimizer = run.keep(optimizer=torch.optim.SGD(model.parameters(), 0.1))
    for batch in run.batches():
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        run.log(loss=loss)

if __name__ == "__main__":
    tg.main(train, steps=10)
"""
