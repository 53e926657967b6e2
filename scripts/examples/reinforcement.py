"""Reinforcement learning: no data, but an environment and a replay memory, saved too.

    python scripts/examples/reinforcement.py                  q + Enter saves and leaves
    python scripts/examples/reinforcement.py --resume latest  goes on: the same run, bit for bit

What playing changes is in an object that the run keeps.
"""

import copy
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Where train_graceful.py lies; a copy of it beside your script needs no such line.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_graceful as tg

CELLS = 10


class Corridor:
    """Its right end pays 1 and leads to the left one; a move in ten slips. It keeps 2,000 moves.

    random and torch draw what follows from the step of the loop. An environment that has a
    generator of its own has to save its state as well.
    """

    def __init__(self) -> None:
        self.cell = self.count = 0
        # Of each: the cell before, the action, the reward, the cell behind.
        self.moves = torch.zeros(2000, 4)

    def move(self, action: int) -> float:
        before = self.cell
        to_the_right = action if random.random() > 0.1 else 1 - action
        self.cell = before + 1 if to_the_right else max(0, before - 1)
        reward = float(self.cell == CELLS - 1)
        if reward:
            self.cell = 0
        move = torch.tensor([before, action, reward, self.cell])
        self.moves[self.count % len(self.moves)] = move
        self.count += 1
        return reward

    def sample(self, size: int) -> Tensor:
        return self.moves[torch.randint(min(self.count, len(self.moves)), (size,))]

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def train(run: tg.Run) -> None:
    """Learns to walk to the right, by Q-learning with a target network."""
    o = run.options
    model = run.model(nn.Sequential(nn.Embedding(CELLS, 32), nn.ReLU(), nn.Linear(32, 2)))
    optimizer = run.keep(optimizer=torch.optim.AdamW(model.parameters(), o.lr))
    target = run.keep(target=copy.deepcopy(run.module))
    corridor = run.keep(corridor=Corridor())

    # Without run.data it yields the number of the step.
    for step in run.batches():
        if step % 50 == 0:
            target.load_state_dict(run.module.state_dict())
        explores = random.random() < max(0.1, 1 - step / 500)
        best = run.module(torch.tensor(corridor.cell, device=run.device)).argmax().item()
        reward = corridor.move(random.randrange(2) if explores else best)

        before, action, rewards, after = corridor.sample(o.batch_size).to(run.device).T
        with torch.no_grad():
            # A reward ends the episode.
            worth = rewards + 0.9 * (1 - rewards) * target(after.long()).amax(dim=1)
        values = model(before.long()).gather(1, action.long().unsqueeze(1)).squeeze(1)
        loss = F.smooth_l1_loss(values, worth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss, reward=reward)


if __name__ == "__main__":
    tg.main(train, lr=3e-3, batch_size=32, steps=1000, log_every=100)
