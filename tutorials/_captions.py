"""Pictures of 64x64 pixels, what is said of them, and what each word of it names."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _canvases import Canvases, with_digits
from _digits import mnist
from torch import Tensor, nn

SIZE, MOST = 64, 3  # pixels of a side, and the most digits on a canvas
END, BEGIN, UNKNOWN = range(3)
SIGNS = [".", "<begin>", "<unknown>"]
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@dataclass(frozen=True)
class Captions:
    """Pictures and their captions.

    Arguments:
        images: Shape ``(number, channels, 64, 64)``, in [0, 1].
        words: Shape ``(number, longest)``: numbers of words, END after the last one.
        boxes: Shape ``(number, longest, 4)``: where that lies which a word names, as
            ``(x0, y0, w, h)`` in units of the picture; 0 where that is not known.
        vocabulary: The words.
    """

    images: Tensor
    words: Tensor
    boxes: Tensor
    vocabulary: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> "Captions":
        """The same on a device."""
        moved = (t.to(device) for t in (self.images, self.words, self.boxes))
        return Captions(*moved, self.vocabulary)


def before(words: Tensor) -> Tensor:
    """The word before each one."""
    return nn.functional.pad(words[:, :-1], (1, 0), value=BEGIN)


def inside(weights: Tensor, boxes: Tensor) -> Tensor:
    """How much of the weight of a square grid's cells lies on those that touch a box.

    Arguments:
        weights: Shape ``(..., cells)``, row by row.
        boxes: Shape ``(..., 4)``.
    """
    cells = round(weights.shape[-1] ** 0.5)
    start, end = boxes[..., :2, None], (boxes[..., :2] + boxes[..., 2:])[..., None]
    low = torch.arange(cells, device=weights.device) / cells
    columns, rows = ((low < end) & (low + 1 / cells > start)).unbind(-2)
    return (weights * (rows[..., None] & columns[..., None, :]).flatten(-2)).sum(-1)


def digits(folder: Path | None, train: int, test: int) -> tuple[Captions, Captions]:
    """Canvases with one to three digits, as "three above seven below one", from left to right.

    Between two digits a word says whether the one is above or below the next. So each canvas has
    one true caption.
    """
    return tuple(
        _described(with_digits(split, number, SIZE, most=MOST, seed=seed))
        for seed, (split, number) in enumerate(zip(mnist(folder), (train, test), strict=True))
    )


def emoji(folder: Path | None, most: int | None = None) -> tuple[Captions, Captions] | None:
    """3,403 pictures of Noto Emoji, white turned into black, and their Unicode names.

    ``most`` is how many are taken of each part. None where there is no folder ``emoji_captions`` in
    ``folder``. 330 are for test, none of which differs from one to learn from by its skin tone
    alone. Words that are seen fewer than three times are UNKNOWN.
    """
    if folder is None or not (folder / "emoji_captions").is_dir():
        print("the emoji are not at hand (see --data): canvases of digits alone")
        return None
    file = np.load(folder / "emoji_captions" / "noto_emoji_48x48_names.npz")
    names = [re.findall(r"[\w-]+", name.lower()) for name in file["caption"]]
    is_test = torch.tensor(file["split"] != "train")
    learnt = [name for name, held_out in zip(names, is_test, strict=True) if not held_out]
    counts = Counter(word for name in learnt for word in name)
    vocabulary = [*SIGNS, *(word for word, count in counts.most_common() if count >= 3)]
    index = {word: number for number, word in enumerate(vocabulary)}
    words = torch.full((len(names), 1 + max(map(len, names))), END)
    for row, name in zip(words, names, strict=True):
        row[: len(name)] = torch.tensor([index.get(word, UNKNOWN) for word in name])
    images = nn.functional.pad(1 - torch.tensor(file["image"]).movedim(-1, 1) / 255, (8,) * 4)
    boxes = torch.zeros(*words.shape, 4)
    parts = (mask.nonzero().squeeze(1)[:most] for mask in (~is_test, is_test))
    return tuple(Captions(images[p], words[p], boxes[p], vocabulary) for p in parts)


def _described(canvases: Canvases) -> Captions:
    vocabulary = [*SIGNS, "above", "below", *DIGITS]
    above, below, zero = (vocabulary.index(word) for word in ("above", "below", "zero"))
    x0, y0, w, h = canvases.boxes.unbind(-1)
    present = canvases.labels >= 0
    order = torch.where(present, x0 + w / 2, 2.0).argsort(1)
    labels, middle, present = (x.gather(1, order) for x in (canvases.labels, y0 + h / 2, present))
    relations = torch.where(middle < middle.roll(-1, 1), above, below)
    followed = present.roll(-1, 1) & (torch.arange(MOST) < MOST - 1)
    names, between = (zero + labels).where(present, END), relations.where(followed, END)
    boxes = canvases.boxes.gather(1, order[..., None].expand(-1, -1, 4))
    where = torch.stack([boxes, torch.zeros_like(boxes)], 2).flatten(1, 2)
    words = torch.stack([names, between], 2).flatten(1)
    return Captions(canvases.images[:, None], words, where, vocabulary)
