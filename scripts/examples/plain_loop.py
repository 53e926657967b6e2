"""A loop that stays yours: only the monitor and the two functions for checkpoints are used.

    python scripts/examples/plain_loop.py           q + Enter saves and leaves, s + Enter saves
    python scripts/examples/plain_loop.py mine.pt   goes on from there

Ctrl-C and a scheduler's signals leave in the same way, with an exit code of their own.
"""

import sys
from pathlib import Path

import torch

# Where train_graceful.py lies; a copy of it beside your script needs no such line.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from train_graceful import ExitMonitor, load_checkpoint, save_checkpoint

model = torch.nn.Linear(8, 1)
optimizer = torch.optim.AdamW(model.parameters())
step = 0
if len(sys.argv) > 1:
    state = load_checkpoint(sys.argv[1])
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    step = state["step"]


def save() -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    save_checkpoint(state, "mine.pt")
    print(f"Saved mine.pt at step {step}")


with ExitMonitor() as monitor:
    while step < 1_000_000 and not monitor.exit_requested:
        loss = model(torch.randn(32, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if monitor.save_requested:
            monitor.save_requested = False
            save()
    # Inside the block: a second Ctrl-C ends even a save that takes too long.
    save()

print(f"Left because of {monitor.reason or 'all steps done'}")
sys.exit(monitor.exit_code)
