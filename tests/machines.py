"""Machines made of Linux namespaces: hosts with addresses and processes of their own."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import DEVNULL, PIPE

import helpers as h
import pexpect
import pytest

TOOLS = ("ip", "unshare", "nsenter", "hostname", "mount", "pgrep")
NETWORK = "10.213.7"
# Waits until the tests have ended, however they do. No parent waits for what it inherits.
INIT = "import signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print(flush=True);"
INIT += "sys.stdin.read()"


class Host:
    """A network address, a name, a table of processes; the files are this machine's.

    Its process 1 is `init`, which waits; everything on the host ends with it.
    """

    def __init__(self, number: int, switch: int, folder: Path, spawn) -> None:
        self._spawn = spawn
        alone = "unshare --net --uts --mount --pid --fork --kill-child --mount-proc".split()
        how = {"stdin": PIPE, "stdout": PIPE, "stderr": DEVNULL, "start_new_session": True}
        self._unshare = subprocess.Popen([*alone, sys.executable, "-c", INIT], **how)
        self._unshare.stdout.readline()
        [self.init] = h.worker_pids(self._unshare.pid)
        self.enter = f"nsenter --target={self.init} --net --uts --mount --pid".split()
        hosts, plug = folder / f"host{number}.hosts", f"plug{number}"
        hosts.write_text(f"127.0.0.1 localhost\n{NETWORK}.1 host1\n{NETWORK}.2 host2\n")
        for command in (
            f"ip link add eth0 netns {self.init} type veth peer name {plug} netns {switch}",
            f"nsenter --target={switch} --net ip link set {plug} master switch up",
        ):
            subprocess.run(command.split(), check=True)
        self.run(f"hostname host{number}")
        self.run(f"mount --bind {hosts} /etc/hosts")
        self.run(f"ip address add {NETWORK}.{number}/24 dev eth0")
        self.run("ip link set lo up")
        self.run("ip link set eth0 up")

    def run(self, command: str) -> None:
        subprocess.run([*self.enter, *command.split()], check=True)

    def train(self, *options: object, size: int = 2, **environment: object) -> pexpect.spawn:
        """What scripts/train_torchrun.sh starts; it meets another host's unless NNODES is 1."""
        together = {"NNODES": 2, "RENDEZVOUS": "host1:29500", "OMP_NUM_THREADS": 1, **environment}
        return h.by_script(self._spawn, size, *options, enter=self._go_in, **together)

    def _go_in(self) -> None:
        """For a fork: goes on in a fork of its own, whose parent has its exit code."""
        libc = ctypes.CDLL(None, use_errno=True)
        names = [f"/proc/{self.init}/ns/{kind}" for kind in ("net", "uts", "pid", "mnt")]
        # All of them before the first, behind which /proc is another.
        for space in [os.open(name, os.O_RDONLY) for name in names]:
            if libc.setns(space, 0):
                raise OSError(ctypes.get_errno(), "setns")
            os.close(space)
        if pid := os.fork():
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os._exit(code if code >= 0 else 128 - code)

    def pids(self) -> list[int]:
        """Of the processes that live on this host, but for init."""
        command = ["pgrep", "--ns", str(self.init), "--nslist", "pid"]
        found = subprocess.run(command, stdout=PIPE, text=True).stdout.split()
        return [int(pid) for pid in found if int(pid) != self.init]

    def switch_off(self) -> None:
        """No packet says good-bye."""
        if self._unshare.poll() is None:
            self.run("ip link set eth0 down")
            os.kill(self.init, signal.SIGKILL)
            self._unshare.communicate()


class Hosts:
    """hosts[0] and so on, each made when it is first asked for, all on one switch."""

    def __init__(self, folder: Path, spawn=None) -> None:
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        if missing or os.getuid() or sys.platform != "linux":
            pytest.skip(f"hosts of their own need Linux, root and iproute2 (missing: {missing})")
        self._folder, self._spawn, self._hosts = folder, spawn, {}
        wait = ["unshare", "--net", "sh", "-c", "echo; read wait"]
        self._switch = subprocess.Popen(wait, stdin=PIPE, stdout=PIPE)
        if not self._switch.stdout.readline():
            pytest.skip("this machine lets nobody make namespaces")
        ip = ["nsenter", f"--target={self._switch.pid}", "--net", "ip", "link"]
        subprocess.run([*ip, "add", "switch", "type", "bridge"], check=True)
        subprocess.run([*ip, "set", "switch", "up"], check=True)

    def __getitem__(self, number: int) -> Host:
        if number not in self._hosts:
            self._hosts[number] = Host(number + 1, self._switch.pid, self._folder, self._spawn)
        return self._hosts[number]

    def close(self) -> None:
        for host in self._hosts.values():
            host.switch_off()
        self._switch.communicate()


# A script of somebody's own.
MINE = """
import torch
from torch import nn
import train_graceful as tg

def train(run):
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    run.data(torch.utils.data.TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)))
    layers = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.GELU(), nn.Linear(16, 1)
    model = run.model(nn.Sequential(*layers))
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
