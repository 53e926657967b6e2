"""Hugging Face's Trainer stays in charge: a callback asks the monitor after every step.

Needs transformers and accelerate.

    python scripts/examples/huggingface.py          q + Enter saves and leaves; again goes on
"""

import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

# Where train_graceful.py lies; a copy of it beside your script needs no such line.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from train_graceful import ExitMonitor

FOLDER = "hf_checkpoints"


class LeaveGracefully(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if monitor.exit_requested:
            # The step is complete: save it and end.
            control.should_save = control.should_training_stop = True
        return control


class Model(torch.nn.Linear):
    def forward(self, x):
        return {"loss": super().forward(x).square().mean()}


data = [{"x": torch.randn(8)} for _ in range(1000)]
arguments = TrainingArguments(FOLDER, num_train_epochs=10_000, save_steps=10_000, report_to=[])
trainer = Trainer(Model(8, 1), arguments, train_dataset=data, callbacks=[LeaveGracefully()])
last = get_last_checkpoint(FOLDER) if Path(FOLDER).is_dir() else None
with ExitMonitor() as monitor:
    trainer.train(resume_from_checkpoint=last)
print(f"Left at step {trainer.state.global_step} because of {monitor.reason or 'all steps done'}")
sys.exit(monitor.exit_code)
