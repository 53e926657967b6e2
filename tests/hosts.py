"""Hosts that can be unplugged, stopped and switched off: each a set of namespaces of its own on this machine."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from ranks import by_script

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
