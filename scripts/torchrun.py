"""torchrun with its own options, and with the exit codes of train_graceful.py.

torchrun itself would return 1 and a page of traceback, below which what the program said is lost.
"""

import dataclasses
import signal
import sys

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import main

signals = "SIGTERM,SIGINT,SIGUSR1,SIGUSR2,SIGXCPU"
# As it is under nohup.
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
    signals += ",SIGHUP"
known = {field.name for field in dataclasses.fields(LaunchConfig)}
wanted = {"--signals-to-handle": "signals_to_handle", "--shutdown-timeout": "shutdown_timeout"}
missing = tuple(option for option, name in wanted.items() if name not in known)
if missing:
    text = f"PyTorch {torch.__version__} has no torchrun {' '.join(missing)}"
    print(f"⚠️ {text}: half a minute for the last save, and SIGUSR1 ends it", file=sys.stderr)
words = [f"--signals-to-handle={signals}", *sys.argv[1:]]
try:
    main([word for word in words if not word.startswith(missing)])
except ChildFailedError as error:
    code = error.get_first_failure()[1].exitcode
    sys.exit(code if code > 0 else 128 - code)
except SignalException as error:
    sys.exit(128 + error.sigval)
except RendezvousConnectionError as error:
    sys.exit(f"torchrun: the machine where all meet does not answer ({error})")
