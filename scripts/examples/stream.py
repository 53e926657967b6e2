"""A stream: documents of any length, packed into windows, that goes on where it was.

    python scripts/examples/stream.py                  q + Enter saves and leaves
    python scripts/examples/stream.py --resume latest  goes on: the same run, bit for bit

Its state_dict and load_state_dict say where.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Where train_graceful.py lies; a copy of it beside your script needs no such line.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_graceful as tg

TOKENS, DOCUMENTS = 64, 500


def document(number: int) -> Tensor:
    """Made up, in the place of one that is read: it counts by steps of 1 to 3."""
    generator = torch.Generator().manual_seed(number)
    length = int(torch.randint(20, 400, (), generator=generator))
    return torch.randint(1, 4, (length,), generator=generator).cumsum(0) % TOKENS


class Packed:
    """Batches of windows of 33 tokens, from documents that are laid end to end.

    Each rank reads documents of its own. Its state is which one comes next, and what is left over.
    """

    def __init__(self, batch_size: int, rank: int, world_size: int) -> None:
        self.batch_size, self.first, self.stride = batch_size, rank, world_size
        self.next, self.rest = rank, document(0)[:0]

    def __iter__(self) -> Iterator[Tensor]:
        size = self.batch_size * 33
        while self.next < DOCUMENTS:
            self.rest = torch.cat([self.rest, document(self.next)])
            self.next += self.stride
            while len(self.rest) >= size:
                batch, self.rest = self.rest[:size], self.rest[size:]
                yield batch.view(-1, 33)
        # Exhausted, it is asked again for the next epoch.
        self.next = self.first

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next, "rest": self.rest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next, self.rest = state["next"], state["rest"]


def train(run: tg.Run) -> None:
    """Learns which token follows which."""
    o = run.options
    stream = Packed(o.batch_size // run.world_size, run.rank, run.world_size)
    windows = torch.cat([document(DOCUMENTS + number) for number in range(20)]).split(33)
    run.data(stream, windows[:-1])
    model = run.model(nn.Sequential(nn.Embedding(TOKENS, 32), nn.Linear(32, TOKENS)))
    optimizer = run.keep(optimizer=torch.optim.AdamW(model.parameters(), o.lr))

    def losses(windows: Tensor) -> Tensor:
        logits = model(windows[:, :-1]).transpose(1, 2)
        return F.cross_entropy(logits, windows[:, 1:], reduction="none").mean(dim=1)

    def evaluate(windows: Tensor) -> dict[str, Tensor]:
        return {"loss": losses(windows)}

    for windows in run.batches(evaluate):
        loss = losses(windows).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss)


if __name__ == "__main__":
    tg.main(train, lr=1e-2, batch_size=16, steps=300, eval_every=50)
