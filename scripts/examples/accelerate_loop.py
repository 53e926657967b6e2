"""Your own loop with Hugging Face's accelerate, which saves; the monitor is asked each batch.

Needs accelerate.

    python scripts/examples/accelerate_loop.py      q + Enter saves and leaves; again goes on
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

# Where train_graceful.py lies; a copy of it beside your script needs no such line.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from train_graceful import ExitMonitor

FOLDER = Path("accelerate_checkpoint")

accelerator = Accelerator()
model = torch.nn.Linear(8, 1)
data = torch.utils.data.DataLoader(torch.randn(1000, 8), 8)
optimizer = torch.optim.AdamW(model.parameters())
model, optimizer, data = accelerator.prepare(model, optimizer, data)
if FOLDER.is_dir():
    accelerator.load_state(FOLDER)
epoch = 0
with ExitMonitor() as monitor:
    while not monitor.exit_requested:
        print(f"Epoch {epoch}")
        epoch += 1
        for batch in data:
            loss = model(batch).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if monitor.exit_requested:
                # The batch is complete.
                break
    accelerator.save_state(FOLDER)
print(f"Left because of {monitor.reason}")
sys.exit(monitor.exit_code)
