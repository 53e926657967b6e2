"""torchrun with this project's manners: signals, exit codes, and machines that come and go."""

import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError
from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend as backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.run import main

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_graceful import give_up_silent_peers

open_store, meet = backend._create_tcp_store, DynamicRendezvousHandler.next_rendezvous


def connect(parameters):
    """A machine that has gone without a word would be waited for a quarter of an hour."""
    store = open_store(parameters)
    give_up_silent_peers()
    return store


def meet_anew(handler):
    """Says each time where the processes meet, and how often the machines have met.

    PyTorch says the first only once, which a machine that comes later does not hear; and each
    machine counts its own restarts.
    """
    handler._bootstrap_store_info = None
    meeting = meet(handler)
    os.environ["RENDEZVOUS_ROUND"] = str(handler._state_holder.state.round)
    return meeting


backend._create_tcp_store = connect
DynamicRendezvousHandler.next_rendezvous = meet_anew
signals = "SIGTERM,SIGINT,SIGUSR1,SIGUSR2,SIGXCPU"
# As it is under nohup.
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
    signals += ",SIGHUP"
sys.argv.insert(1, "--signals-to-handle=" + signals)
try:
    main()
# torchrun itself would return 1 and a page of traceback, below which the program's last lines are lost.
except ChildFailedError as error:
    code = error.get_first_failure()[1].exitcode
    sys.exit(code if code > 0 else 128 - code)
except SignalException as error:
    sys.exit(128 + error.sigval)
except RendezvousConnectionError:
    sys.exit(f"torchrun: {os.environ.get('RENDEZVOUS', 'the first machine')} does not answer any more")
