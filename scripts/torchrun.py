"""torchrun with its own options, and with the exit codes of train_graceful.py.

torchrun itself would return 1 and a page of traceback, below which the program's last lines are lost.
"""

import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError
from torch.distributed.run import main

signals = "SIGTERM,SIGINT,SIGUSR1,SIGUSR2,SIGXCPU"
# As it is under nohup.
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
    signals += ",SIGHUP"
try:
    main([f"--signals-to-handle={signals}", *sys.argv[1:]])
except ChildFailedError as error:
    code = error.get_first_failure()[1].exitcode
    sys.exit(code if code > 0 else 128 - code)
except SignalException as error:
    sys.exit(128 + error.sigval)
except RendezvousConnectionError as error:
    sys.exit(f"torchrun: the machine where all meet does not answer ({error})")
