"""An exponential moving average of the weights, and a picture of what it does each epoch.

    python scripts/examples/ema_pictures.py                  q + Enter saves and leaves
    python scripts/examples/ema_pictures.py --resume latest  goes on: the same run, bit for bit

The pictures are in checkpoints/pictures/, and are the same ones after any stop.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset

# Where train_graceful.py lies; a copy of it beside your script needs no such line.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_graceful as tg


def made_up(count: int, seed: int) -> TensorDataset:
    """Pictures (1, 24, 24) of a disc, with noise and without."""
    generator = torch.Generator().manual_seed(seed)
    x, y, radius = torch.rand(3, count, 1, 1, 1, generator=generator)
    line = torch.linspace(0, 1, 24)
    clean = ((line - x) ** 2 + (line[:, None] - y) ** 2 < radius**2 / 4).float()
    return TensorDataset(clean + 0.5 * torch.randn(clean.shape, generator=generator), clean)


def denoiser() -> nn.Module:
    first, last = nn.Conv2d(1, 8, 5, padding=2), nn.Conv2d(8, 1, 5, padding=2)
    return nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), last)


def write_picture(path: Path, image: Tensor) -> None:
    """Of (height, width) values from 0 to 1, as a PGM, which needs no library."""
    pixels = (255 * image.clamp(0, 1)).byte().cpu().numpy()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"P5 %d %d 255\n" % pixels.shape[::-1] + pixels.tobytes())


def train(run: tg.Run) -> None:
    """Removes noise from pictures."""
    o = run.options
    validation = made_up(64, seed=2)
    run.data(made_up(512, seed=1), validation)
    model = run.model(denoiser())
    optimizer = run.keep(optimizer=torch.optim.AdamW(model.parameters(), o.lr))
    average = get_ema_multi_avg_fn(0.9)
    ema = run.keep(ema=AveragedModel(run.module, multi_avg_fn=average, use_buffers=True))
    # It is evaluated and drawn by, never trained.
    ema.eval()

    def evaluate(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        noisy, clean = batch
        return {"loss": F.mse_loss(ema(noisy), clean, reduction="none").mean(dim=(1, 2, 3))}

    @torch.no_grad()
    def draw(row: dict[str, float]) -> None:
        # There is a row each --log-every batches too.
        if "val_loss" in row:
            noisy = validation.tensors[0][:8].to(run.device)
            above, below = (torch.cat([*each.squeeze(1)], dim=1) for each in (noisy, ema(noisy)))
            path = Path(o.checkpoint_dir, "pictures", f"epoch_{row['epoch']}.pgm")
            write_picture(path, torch.cat([above, below]))

    run.on_row = draw
    for noisy, clean in run.batches(evaluate):
        loss = F.mse_loss(model(noisy), clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update_parameters(run.module)
        run.log(loss=loss)


if __name__ == "__main__":
    tg.main(train, lr=1e-2, batch_size=64, epochs=5, eval_every="epoch")
