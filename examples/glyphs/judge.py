"""The judge of the glyph boards: reads single cells, and says letter and typeface.

    python examples/glyphs/judge.py        # trains it again (about three minutes) and writes judge.safetensors

Two heads (letter, typeface) stand on one feature layer. A board is scored by its cells: how many show the asked
letter, how often two cells of a board both show it and in the same typeface, and the Fréchet distance of the features
to those of real boards.
"""

from __future__ import annotations

import argparse
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from boards import CELL, FACES, LETTERS, all_specs, cell, real_boards
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional


WEIGHTS = Path(__file__).with_name("judge.safetensors")
FEATURES = 64
REFERENCE_SEED = 1_000_003
REFERENCE_BOARDS_PER_LETTER = 100


class Judge(nn.Module):
    """A small CNN on gray 32x32 cells."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 96, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(96 * 16, 128),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(128, FEATURES),
        )
        self.letter = nn.Linear(FEATURES, len(LETTERS))
        self.face = nn.Linear(FEATURES, len(FACES))

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> Judge:
        judge = cls()
        judge.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
        return judge.eval().requires_grad_(False)

    def forward(self, cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gray cells (N, 1, 32, 32) in [0, 1] to letter logits, typeface logits and features."""
        features = self.body(1 - cells)
        active = functional.relu(features)
        return self.letter(active), self.face(active), features

    def read(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images (N, 3, H, W) to the letters and typefaces read (N, cells), and the features (N, cells, 64)."""
        cells = split_cells(images)
        flat = cells.reshape(-1, 1, CELL, CELL).to(self.letter.weight.device)
        parts = [self(part) for part in flat.split(1024)]
        letters, faces, features = (torch.cat(group).cpu() for group in zip(*parts, strict=True))
        shape = cells.shape[:2]
        return letters.argmax(-1).view(shape), faces.argmax(-1).view(shape), features.view(*shape, -1)

    @cached_property
    def _reference(self) -> torch.Tensor:
        """The features of real boards, one cell of each (they are all alike)."""
        letters = [letter for letter in range(len(LETTERS)) for _ in range(REFERENCE_BOARDS_PER_LETTER)]
        return self.read(real_boards(letters, REFERENCE_SEED, 1, 1))[2].flatten(0, 1)

    def _frechet(self, features: torch.Tensor) -> float:
        """Distance to the real boards, in features that have deviation 1 in every channel over the real boards."""
        deviation = self._reference.std(0)
        return frechet_distance(_moments(features / deviation), _moments(self._reference / deviation))

    def score(self, images: torch.Tensor, letters: list[int] | str | torch.Tensor) -> dict[str, float]:
        """Score images (N, 3, H, W) in [0, 1] against the letters asked for (a string, or indices)."""
        if isinstance(letters, str) or (len(letters) and isinstance(letters[0], str)):
            letters = [LETTERS.index(letter) for letter in letters]
        asked = torch.as_tensor(letters).cpu().view(-1, 1)
        if len(asked) != len(images):
            raise ValueError(f"{len(images)} images, but {len(asked)} letters")
        read, faces, features = self.read(images)
        return {
            "accuracy": (read == asked).float().mean().item(),
            # Blank or ruined cells often look alike to the judge; they must not count as agreeing.
            "agreement": _agreement(torch.where(read == asked, faces, -1 - torch.arange(faces.shape[1]))),
            "frechet": self._frechet(features),
        }


def split_cells(images: torch.Tensor) -> torch.Tensor:
    """Images (N, C, H, W) to gray cells (N, cells, 32, 32). Any whole number of cells, in rows and columns."""
    height, width = images.shape[-2:]
    if height % CELL or width % CELL:
        raise ValueError(f"a board is a whole number of {CELL} pixel cells, not {height}x{width}")
    gray = images.float().mean(1).clamp(0, 1)
    grid = gray.view(len(gray), height // CELL, CELL, width // CELL, CELL)
    return grid.permute(0, 1, 3, 2, 4).reshape(len(gray), -1, CELL, CELL)


def _agreement(faces: torch.Tensor) -> float:
    """The share of pairs of different cells of a board with the same number: typefaces where the letter is right."""
    count = faces.shape[1]
    if count < 2:
        return float("nan")
    same = (faces[:, :, None] == faces[:, None, :]).float().sum((1, 2)) - count
    return (same / (count * (count - 1))).mean().item()


def _moments(features: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    flat = features.reshape(-1, features.shape[-1]).double().numpy()
    return flat.mean(0), np.cov(flat, rowvar=False)


def frechet_distance(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> float:
    """The Fréchet distance of two normal distributions, given as (mean, covariance)."""
    (mean1, cov1), (mean2, cov2) = first, second
    # The trace of the root of cov1 cov2 is that of the root of the symmetric root1 cov2 root1.
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(0)).sum()
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def _augment(cells: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift, scale, blur and roughen cells (N, 1, 32, 32) a little, so that drawn cells count as readable ones do."""

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(len(cells), *shape, generator=generator) * (high - low) + low

    matrix = torch.zeros(len(cells), 2, 3)
    matrix[:, 0, 0] = uniform(0.96, 1.04)
    matrix[:, 1, 1] = uniform(0.96, 1.04)
    matrix[:, :, 2] = uniform(-1 / 16, 1 / 16, 2)
    grid = functional.affine_grid(matrix, list(cells.shape), align_corners=False)
    ink = functional.grid_sample(1 - cells, grid, align_corners=False)
    blurred = functional.avg_pool2d(functional.pad(ink, (1, 1, 1, 1)), 3, stride=1)
    ink = torch.lerp(ink, blurred, uniform(0, 0.6, 1, 1, 1)) * uniform(0.85, 1.1, 1, 1, 1)
    noise = torch.randn(cells.shape, generator=generator) * uniform(0, 0.08, 1, 1, 1)
    return (1 - ink + noise).clamp(0, 1)


def train(steps: int, seed: int) -> Judge:
    """Train on augmented renders of all cells."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    specs = all_specs()
    pixels = torch.stack([torch.from_numpy(cell(spec).copy()) for spec in specs])[:, None]
    letters = torch.tensor([spec.letter for spec in specs])
    faces = torch.tensor([spec.face for spec in specs])
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        index = torch.randint(len(specs), (128,), generator=generator)
        letter_logits, face_logits, _ = judge(_augment(pixels[index].float() / 255, generator))
        letter_loss = functional.cross_entropy(letter_logits, letters[index])
        face_loss = functional.cross_entropy(face_logits, faces[index])
        optimizer.zero_grad()
        (letter_loss + face_loss).backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps - 1:
            print(f"step {step}: letter {letter_loss.item():.4f}, typeface {face_loss.item():.4f}", flush=True)
    return judge.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the judge of the glyph boards.")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    judge = train(arguments.steps, arguments.seed)
    weights = {name: tensor.half().contiguous() for name, tensor in judge.state_dict().items()}
    save_file(weights, arguments.output, metadata={"format": "pt"})
    letters = list(range(len(LETTERS))) * 4
    trained = Judge.load(arguments.output)
    print("real boards:", trained.score(real_boards(letters, 7), letters))


if __name__ == "__main__":
    main()
