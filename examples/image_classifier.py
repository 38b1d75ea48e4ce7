"""A classifier of images and a loader of its batches: what `autopar train` takes, and a loop of one's own.

autopar train examples/image_classifier.py:Classifier --data examples/image_classifier.py:loader \
    --eval-data examples/image_classifier.py:loader --mesh dp=2,tp=2 --checkpoint run --resume
torchrun --nproc-per-node 4 examples/image_classifier.py --mesh dp=2,tp=2 --zero 1
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import autopar

SIZE, CLASSES = 12, 4


class Classifier(nn.Module):
    """It returns logits: the loss is put on, since a batch has classes that forward does not take."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean((2, 3)))


def pictures(count: int, seed: int) -> TensorDataset:
    """Stripes across, stripes down, a board and a ring, each with noise: (count, 3, SIZE, SIZE) and their classes."""
    generator = torch.Generator().manual_seed(seed)
    down, across = torch.arange(SIZE)[:, None], torch.arange(SIZE)[None]
    ring = (down - SIZE // 2) ** 2 + (across - SIZE // 2) ** 2
    drawn = [down // 2 % 2, across // 2 % 2, (down // 2 + across // 2) % 2, (ring < 20) & (ring > 6)]
    patterns = torch.stack([pattern.expand(SIZE, SIZE).float() for pattern in drawn])
    classes = torch.randint(CLASSES, (count,), generator=generator)
    noise = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return TensorDataset(patterns[classes][:, None] + 0.5 * noise, classes)


def loader(batch_size: int, split: str = "train") -> DataLoader[tuple[Tensor, ...]]:
    """Batches of images and classes; the last one has fewer rows. Every rank gets whole batches, in the same order."""
    train = split == "train"
    return DataLoader(pictures(108 if train else 40, seed=0 if train else 1), batch_size, shuffle=train)


class WithLoss(nn.Module):
    """In a loop of one's own the loss is part of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model(images), classes)


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """The losses of the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", type=autopar.Mesh.parse, default=autopar.Mesh(dp=1))
    parser.add_argument("--zero", type=int, default=0)
    parser.add_argument("--passes", type=int, default=1, help="through the data")
    given = parser.parse_args(arguments)

    torch.manual_seed(0)  # the same weights, and the same orders, on every rank
    model = autopar.parallelize(WithLoss(Classifier()), given.mesh, autopar.Plan(zero=given.zero))
    batches = loader(batch_size=24)
    model.prepare(*next(iter(batches)))  # from now on a rank has its parts only
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(given.passes):
        for images, classes in batches:
            losses.append(float(model.train_step(images, classes)))
            optimizer.step()
            optimizer.zero_grad()
    return losses


if __name__ == "__main__":
    print(*[f"{loss:.4f}" for loss in main()])
