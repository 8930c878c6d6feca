"""Pairs of sentences in two languages: Multi30k's, or made ones where these are not at hand."""

import gzip
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from sacrebleu import corpus_bleu
from torch import Tensor

PAD, UNKNOWN, BEGIN, END = range(4)


def split(sentence: str) -> list[str]:
    """The words and signs of a sentence; what is elided keeps its apostrophe: ``l'``."""
    return re.findall(r"\w+(?:-\w+)*'?|[^\w\s]", sentence)


def join(words: Sequence[str]) -> str:
    """The sentence of some words, with spaces as French and English have them."""
    sentence = re.sub(r"(?<=\w') ", "", " ".join(words))
    return re.sub(r" (?=[.,!?)%])", "", sentence)


class Vocabulary:
    """The words that some sentences have at least ``least`` times, the most frequent ones first."""

    def __init__(self, sentences: Sequence[str], least: int) -> None:
        counts = Counter(word for sentence in sentences for word in split(sentence))
        seen = [word for word, count in counts.most_common() if count >= least]
        self.words = ["<pad>", "<unknown>", "<begin>", "<end>", *seen]
        self.index = {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def numbers(self, sentences: Sequence[str]) -> Tensor:
        """Shape ``(number, longest + 2)``: each sentence from BEGIN to END, then PAD."""
        rows = [
            [BEGIN, *(self.index.get(word, UNKNOWN) for word in split(sentence)), END]
            for sentence in sentences
        ]
        longest = max(map(len, rows))
        return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])

    def sentence(self, numbers: Tensor) -> str:
        """What stands before END."""
        words = [self.words[n] for n in numbers.tolist()]
        return join(words[: words.index("<end>")] if "<end>" in words else words)


@dataclass(frozen=True)
class Pairs:
    """Sentences in one language, and what they are in another."""

    source: list[str]
    target: list[str]

    def __len__(self) -> int:
        return len(self.source)

    def first(self, number: int) -> "Pairs":
        """Some of them."""
        return Pairs(self.source[:number], self.target[:number])


def english_french(folder: Path | None) -> dict[str, Pairs]:
    """Multi30k's captions of photographs: 29,000 to learn from, and those of 2016 for test.

    Without a folder ``multi30k`` in ``folder``: 1,000 sentences of a small grammar.
    """
    if folder is None or not (folder / "multi30k").is_dir():
        print("Multi30k is not at hand (see --data): sentences of a small grammar instead")
        source, target = _made(1000)
        parts = {"train": slice(800), "val": slice(800, 900), "test": slice(900, 1000)}
        return {part: Pairs(source[rows], target[rows]) for part, rows in parts.items()}

    def read(part: str) -> Pairs:
        texts = []
        for language in ("en", "fr"):
            path = folder / "multi30k" / "raw" / f"{part}.{language}.gz"
            with gzip.open(path, "rt", encoding="utf-8") as file:
                texts.append(file.read().rstrip("\n").split("\n"))
        return Pairs(*texts)

    return {"train": read("train"), "val": read("val"), "test": read("test_2016_flickr")}


NOUNS = {"dog": "chien", "cat": "chat", "boy": "garçon", "man": "homme", "horse": "cheval"}
COLOURS = {"black": "noir", "white": "blanc", "green": "vert", "small": "petit", "tall": "grand"}
VERBS = {"sees": "voit", "looks for": "cherche", "follows": "suit", "paints": "peint"}


def _made(number: int) -> tuple[list[str], list[str]]:
    """Sentences in which English has the adjective before the noun, and French behind it."""
    generator = random.Random(0)

    def someone() -> tuple[str, str]:
        noun, colour = generator.choice(list(NOUNS)), generator.choice(list(COLOURS))
        return f"a {colour} {noun}", f"un {NOUNS[noun]} {COLOURS[colour]}"

    def sentence() -> tuple[str, str]:
        (who, qui), (whom, que), verb = someone(), someone(), generator.choice(list(VERBS))
        return f"{who} {verb} {whom}.", f"{qui} {VERBS[verb]} {que}."

    english, french = zip(*(sentence() for _ in range(number)), strict=True)
    return list(english), list(french)


def _by_length(source: Tensor, target: Tensor, size: int) -> list[Tensor]:
    """One epoch: the indices of batches whose sentences are of about the same length.

    Lengths count in steps of four, so that batches have few shapes. The order is random.
    """
    steps = [((numbers != PAD).sum(1) + 3) // 4 for numbers in (source, target)]
    key = 100 * steps[0] + steps[1] + torch.rand(len(source), device=source.device)
    batches = key.argsort().split(size)
    return [batches[i] for i in torch.randperm(len(batches))]


def _trimmed(numbers: Tensor) -> Tensor:
    """Without the columns that are padding in all rows, but for a length in steps of four."""
    return numbers[:, : -(-int((numbers != PAD).sum(1).max()) // 4) * 4]


class Subset(NamedTuple):
    """Some words of a vocabulary, in place of all of them.

    Arguments:
        words: Which they are.
        correction: What is added to their scores.
        places: Where among them each target is.
    """

    words: Tensor
    correction: Tensor
    places: Tensor


def _subset(targets: Tensor, size: int, number: int) -> Subset:
    """The targets' words, and others at random that stand for all the others.

    A softmax over them estimates that over the whole vocabulary (Jean et al., 2015).

    Arguments:
        targets: The words of a batch.
        size: The size of the vocabulary.
        number: How many words are taken: more if the batch has more, fewer if there are no more.
    """
    present = torch.zeros(size, device=targets.device)
    present[targets] = 1
    number = min(max(number, int(present.sum())), size)
    words = (present + torch.rand_like(present)).topk(number).indices
    others = (size - present.sum()) / (number - present.sum()).clamp(min=1)
    places = torch.empty(size, dtype=torch.long, device=targets.device)
    places[words] = torch.arange(number, device=targets.device)
    return Subset(words, others.log() * (1 - present[words]), places[targets])


class Batch(NamedTuple):
    """Some sentences, what they are in the other language, and words to compare the latter with."""

    source: Tensor
    target: Tensor
    among: Subset


class Corpus:
    """Sentences in English and French, as numbers on a device.

    Arguments:
        folder: As :func:`english_french`.
        device: Where batches are to be.
        few: Take the first 160 pairs of each part alone.
    """

    def __init__(self, folder: Path | None, device: torch.device, *, few: bool = False) -> None:
        self.pairs = english_french(folder)
        if few:
            self.pairs = {part: pairs.first(160) for part, pairs in self.pairs.items()}
        self.english = Vocabulary(self.pairs["train"].source, least=3)
        self.french = Vocabulary(self.pairs["train"].target, least=3)
        self.numbers = {
            part: (
                self.english.numbers(pairs.source).to(device),
                self.french.numbers(pairs.target).to(device),
            )
            for part, pairs in self.pairs.items()
        }

    def batch(self, part: str, rows: Tensor, candidates: int) -> Batch:
        """Some pairs, whose words are compared with a subset of so many candidates."""
        source, target = (_trimmed(numbers[rows]) for numbers in self.numbers[part])
        return Batch(source, target, _subset(target[:, 1:], len(self.french), candidates))

    def epoch(self, size: int, candidates: int) -> Iterator[Batch]:
        """All pairs to learn from, in batches of sentences of about the same length."""
        for rows in _by_length(*self.numbers["train"], size):
            yield self.batch("train", rows, candidates)

    def translated(self, part: str, translate: Callable[[Tensor], Tensor]) -> list[str]:
        """What a function from numbers to numbers makes of the English sentences."""
        numbers = self.numbers[part][0]
        order = (numbers != PAD).sum(1).argsort()
        batches = [translate(_trimmed(numbers[rows])) for rows in order.split(256)]
        found = [self.french.sentence(words) for batch in batches for words in batch]
        return [found[place] for place in order.argsort()]

    def bleu(self, part: str, translate: Callable[[Tensor], Tensor]) -> float:
        """How near translations are to the true ones: cased BLEU."""
        return corpus_bleu(self.translated(part, translate), [self.pairs[part].target]).score
