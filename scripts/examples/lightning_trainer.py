"""Lightning's Trainer stays in charge: a callback asks the monitor after every batch.

Needs lightning.

    python scripts/examples/lightning_trainer.py    q + Enter saves and leaves; again goes on
"""

import sys
from pathlib import Path

import lightning
import torch

# Where train_graceful.py lies; a copy of it beside your script needs no such line.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from train_graceful import ExitMonitor

CHECKPOINT = Path("lightning.ckpt")


class LeaveGracefully(lightning.Callback):
    def on_train_batch_end(self, trainer, *rest):
        if monitor.exit_requested:
            # The batch is complete: save it and end.
            trainer.save_checkpoint(CHECKPOINT)
            trainer.should_stop = True


class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)

    def training_step(self, batch):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


data = torch.utils.data.DataLoader(torch.randn(1000, 8), 8)
trainer = lightning.Trainer(max_epochs=10_000, callbacks=[LeaveGracefully()], logger=False)
with ExitMonitor() as monitor:
    trainer.fit(Model(), data, ckpt_path=CHECKPOINT if CHECKPOINT.exists() else None)
print(f"Left at step {trainer.global_step} because of {monitor.reason or 'all steps done'}")
sys.exit(monitor.exit_code)
