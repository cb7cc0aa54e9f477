"""ViT and Swin learn scikit-learn's handwritten digits, upscaled from 8 × 8 to 32 × 32 pixels.

    python -m benchmarks.examples.digits          under ten minutes on two CPU cores

1,797 images, one in five for the test; training images are moved by up to two pixels and turned by up to ten degrees.
ViT attends among 64 patches and a class token, Swin in windows of 4 × 4 on a map of 16 × 16 and then 8 × 8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xformer_fast.models import Swin, ViT

from .common import Run, Tables, curve, main, panels, synchronize

SIDE = 32


@dataclass(frozen=True)
class Sizes:
    epochs: int = 24
    batch: int = 64
    images: int | None = None
    vit: tuple[int, int, int] = (64, 4, 4)  # dim, depth, heads
    swin: tuple[int, tuple[int, int], tuple[int, int]] = (48, (2, 2), (3, 6))  # dim, depths, heads
    lr: float = 2e-3


SMOKE = Sizes(epochs=1, batch=8, images=20, vit=(16, 1, 2), swin=(16, (1, 1), (1, 2)))


def digits() -> tuple[Tensor, Tensor]:
    """Images (n, 1, 32, 32) from -1 to 1, and their digits (n,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    return F.interpolate(images, size=(SIDE, SIDE), mode="bicubic"), torch.from_numpy(data.target).long()


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned and moved a little, differently."""
    turn, right, down = torch.rand(3, len(images), generator=generator) * 2 - 1
    turn, right, down = turn * math.radians(10), right * 4 / SIDE, down * 4 / SIDE
    rows = (turn.cos(), -turn.sin(), right), (turn.sin(), turn.cos(), down)
    maps = torch.stack([torch.stack(row, -1) for row in rows], 1)
    places = F.affine_grid(maps, images.shape, align_corners=False)
    return F.grid_sample(images + 1, places, align_corners=False) - 1  # what comes in from outside is background


def models(sizes: Sizes) -> dict[str, nn.Module]:
    dim, depth, heads = sizes.vit
    width, depths, stage_heads = sizes.swin
    return {
        "ViT": ViT(10, image_size=SIDE, patch=4, channels=1, dim=dim, depth=depth, num_heads=heads, dropout=0.1),
        "Swin": Swin(
            10, channels=1, patch=2, dim=width, depths=depths, num_heads=stage_heads, window_size=4, drop_path=0.1
        ),
    }


@torch.no_grad()
def accuracy(run: Run, model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = [(model(part.to(run.device)).argmax(-1).cpu() == wanted).float()
             for part, wanted in zip(images.split(256), labels.split(256), strict=True)]  # fmt: skip
    model.train()
    return torch.cat(right).mean().item()


def train(run: Run, name: str, images: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> list[dict]:
    """One row an epoch."""
    sizes = run.sizes
    torch.manual_seed(0)
    model = models(sizes)[name].to(run.device)
    steps = math.ceil(len(images) / sizes.batch)
    optimizer = torch.optim.AdamW(model.parameters(), sizes.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, sizes.lr, total_steps=sizes.epochs * steps, pct_start=0.2)
    draws = torch.Generator().manual_seed(1)
    checkpoint = run.checkpoint(name, model=model, optimizer=optimizer, schedule=schedule, draws=draws)
    saved = checkpoint.load()
    rows = saved.get("rows", [])
    for epoch in run.steps(len(rows), sizes.epochs, name):
        total, start = 0.0, synchronize(run.device)
        for picked in torch.randperm(len(images), generator=draws).split(sizes.batch):
            batch, wanted = moved(images[picked], draws).to(run.device), labels[picked].to(run.device)
            loss = F.cross_entropy(model(batch), wanted, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(picked)
        seconds = synchronize(run.device) - start
        right = accuracy(run, model, test, test_labels)
        rows.append({"model": name, "epoch": epoch + 1, "loss": total / len(images), "accuracy": right})
        rows[-1] |= {"images_per_second": len(images) / seconds}
        rows[-1] |= {"parameters": sum(p.numel() for p in model.parameters())}
        checkpoint.save(rows=rows)
    checkpoint.every = 0.0
    checkpoint.save(rows=rows)
    return rows


def run(run: Run) -> None:
    images, labels = (x[: run.sizes.images] for x in digits())
    tested = torch.arange(len(images)) % 5 == 0
    epochs, results = [], []
    for name in models(run.sizes):
        rows = train(run, name, images[~tested], labels[~tested], images[tested], labels[tested])
        epochs += rows
        results.append(rows[-1])
        run.write(epochs, "epochs")
        run.write(results)
        print(f"{name:<5} accuracy {rows[-1]['accuracy']:.4f}, {rows[-1]['images_per_second']:.0f} images/s")


def draw(tables: Tables):
    figure, (left, right) = panels(2)
    for row in tables[""]:
        name = row["model"]
        left.plot(*curve(tables["epochs"], "epoch", "loss", model=name), label=name)
        epochs, accuracies = curve(tables["epochs"], "epoch", "accuracy", model=name)
        right.plot(epochs, [100 * (1 - a) for a in accuracies], label=f"{name}: {100 * row['accuracy']:.1f}% right")
    left.set(xlabel="epoch", ylabel="training loss", title="Digits of 32 × 32 pixels")
    right.set(xlabel="epoch", ylabel="wrong on the test images (%)", yscale="symlog", ylim=(0, 100))
    left.legend()
    right.legend()
    return figure


if __name__ == "__main__":
    main(run, draw, Sizes(), SMOKE)
