"""A signal to the whole group costs no batch, and a child is as if there were no monitor."""

import os
import re
import signal
import subprocess
import sys
import termios
import time

import pexpect
import pytest
from helpers import ROOT, Fork, as_in_a_shell, finish, wait_until

LOOP = f"""
import asyncio, multiprocessing, os, pty, signal, subprocess, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
import torch
from train_graceful import ExitMonitor, begin_worker, save_checkpoint

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 10**6
    def __getitem__(self, index):
        time.sleep(0.001)
        return torch.ones(4)

def until_asked():
    while not monitor.exit_requested:
        time.sleep(0.01)

fork = multiprocessing.get_context("fork")
"""


@pytest.fixture
def program(spawn):
    """program(code) runs a person's program in a fork, in a session and on a terminal of its own."""
    return lambda code, *words: spawn(*words, source=LOOP + code)


def ended(child) -> int:
    """The exit code, once the program has ended."""
    finish(child)
    return child.exitstatus


TRAINING = """
step = 0
with ExitMonitor() as monitor:
    for batch in torch.utils.data.DataLoader(Data(), 4, num_workers=2):
        step += 1
        if step == 5:
            print("@training")
        if monitor.exit_requested:
            break
    save_checkpoint({"step": step}, sys.argv[1])
sys.exit(monitor.exit_code)
"""
