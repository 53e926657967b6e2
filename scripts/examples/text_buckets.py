"""Texts of different length: batches of similar lengths, padded; F1 of a rare class.

    python scripts/examples/text_buckets.py                  q + Enter saves and leaves
    python scripts/examples/text_buckets.py --resume latest  goes on: the same run, bit for bit

run.data takes the collate and the sampler, run.batches what makes F1 of all samples.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

# Where train_graceful.py lies; a copy of it beside your script needs no such line.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_graceful as tg

PADDING, WORDS, WANTED = 0, 300, 7
Sample = tuple[Tensor, Tensor]


def made_up(count: int, seed: int) -> list[Sample]:
    """Texts of 5 to 60 words; one in ten has the wanted word in it."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 61, (count,), generator=generator).tolist()
    texts = [torch.randint(1, WORDS, (length,), generator=generator) for length in lengths]
    return [(text, (text == WANTED).any()) for text in texts]


def padded(samples: list[Sample]) -> Sample:
    texts, labels = zip(*samples)
    return pad_sequence(texts, batch_first=True, padding_value=PADDING), torch.stack(labels)


def buckets(lengths: Tensor, size: int) -> Callable[[int], list[list[int]]]:
    def batches(epoch: int) -> list[list[int]]:
        # Random numbers in here follow from the run's seed and the epoch: no seed is needed.
        order = torch.randperm(len(lengths))[: len(lengths) // size * size]
        nearly = lengths[order] + 5 * torch.rand(len(order))
        found = order[nearly.argsort()].view(-1, size)
        return found[torch.randperm(len(found))].tolist()

    return batches


class Finder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 16, padding_idx=PADDING)
        self.head = nn.Linear(16, 1)

    def forward(self, texts: Tensor) -> Tensor:
        words = self.embedding(texts).masked_fill((texts == PADDING).unsqueeze(2), -torch.inf)
        return self.head(words.amax(dim=1)).squeeze(1)


def f1(samples: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of all samples at once: it is no mean of what batches have."""
    found, wanted = samples["found"], samples["wanted"]
    return {"f1": 2 * (found & wanted).sum() / (found.sum() + wanted.sum()).clamp(min=1)}


def train(run: tg.Run) -> None:
    """Finds the texts that have a certain word in them."""
    o = run.options
    training = made_up(2000, seed=1)
    lengths = torch.tensor([len(text) for text, _ in training])
    sampler = buckets(lengths, o.batch_size)
    run.data(training, made_up(500, seed=2), collate=padded, sampler=sampler)
    model = run.model(Finder())
    optimizer = run.keep(optimizer=torch.optim.AdamW(model.parameters(), o.lr))

    def evaluate(batch: Sample) -> dict[str, Tensor]:
        texts, labels = batch
        logits = model(texts)
        loss = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
        # Integers are for f1 alone; of other values the means are logged.
        return {"loss": loss, "found": (logits > 0).long(), "wanted": labels.long()}

    for texts, labels in run.batches(evaluate, best="max f1", summarize=f1):
        loss = F.binary_cross_entropy_with_logits(model(texts), labels.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss, padding=(texts == PADDING).float().mean())


if __name__ == "__main__":
    tg.main(train, lr=2e-2, batch_size=32, epochs=4, eval_every="epoch")
