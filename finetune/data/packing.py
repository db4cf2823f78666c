"""Several examples in one sequence of a fixed length, with positions that restart at each."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from finetune.errors import FinetuneError

if TYPE_CHECKING:
    import torch

    from finetune.data.examples import Examples

# What the loss ignores; the value is PyTorch's.
NOT_LEARNED = -100

# Examples of up to this share of a pack are placed in the order they come in, longer ones by length. Were all
# sorted, packs would hold examples of one length, often of one kind, and training steps would pull in turns.
SHORT = 1 / 8


def best_fit(
    lengths: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int64]], capacity: int
) -> list[list[int]]:
    """Best fit: each example goes where it leaves the least space; long ones first, longest first.

    Johnson et al. 1974, SIAM J. Comput. 3(4); O(n log n) comparisons. Short examples, and long ones of one
    length, keep their order.

    Returns, for each pack, the indices of its examples.

    Raises:
        FinetuneError: an example is longer than the capacity.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and sizes.max() > capacity:
        raise FinetuneError(
            f"an example has {sizes.max()} tokens and a pass holds {capacity}; raise train.tokens_per_pass "
            "or lower data.max_tokens"
        )
    packs: list[list[int]] = []
    spaces: list[int] = []  # the different amounts of space left, ascending
    having: dict[int, list[int]] = {}  # which packs have that much space left
    by_length = np.where(sizes > SHORT * capacity, -sizes, 0)
    for index in np.argsort(by_length, kind="stable").tolist():
        size = int(sizes[index])
        place = bisect_left(spaces, size)
        if place == len(spaces):
            pack, space = len(packs), capacity
            packs.append([index])
        else:
            space = spaces[place]
            pack = having[space].pop()
            packs[pack].append(index)
            if not having[space]:
                del having[space], spaces[place]
        left = space - size
        if left not in having:
            insort(spaces, left)
            having[left] = []
        having[left].append(pack)
    return packs


class PackedDataset:
    """Examples in packs of at most `capacity` tokens, in an order that the seed decides; for a torch
    DataLoader.

    Item: input_ids, labels and position_ids, each int64 [L] with L <= capacity. Labels are not shifted (the
    model shifts them) and -100 where nothing is learned; position_ids begin at 0 with every example.

    Raises:
        FinetuneError: an example is longer than `capacity`.
    """

    def __init__(self, examples: Examples, capacity: int, seed: int = 0) -> None:
        self.examples, self.capacity = examples, capacity
        random = np.random.default_rng(seed)
        # Shuffled before packing too: neighbours in a file are often alike.
        order = random.permutation(len(examples))
        packs = best_fit(examples.lengths[order], capacity)
        self.packs = [order[packs[place]].tolist() for place in random.permutation(len(packs))]

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        import torch

        found = [self.examples[place] for place in self.packs[index]]
        ids = np.concatenate([example.ids for example in found]).astype(np.int64)
        learn = np.concatenate([example.learn for example in found]).astype(bool)
        labels = np.where(learn, ids, NOT_LEARNED)
        positions = np.concatenate([np.arange(len(example.ids)) for example in found])
        # The token before a document's first is another document's last, so the first can never be a target.
        labels[positions == 0] = NOT_LEARNED
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
        }

    @property
    def lengths(self) -> list[int]:
        """Tokens in each pack."""
        lengths = self.examples.lengths
        return [int(lengths[pack].sum()) for pack in self.packs]

    @property
    def tokens(self) -> int:
        """Tokens in all packs; `tokens / (len(self) * capacity)` is how full they are."""
        return self.examples.tokens


def collate(
    batch: Sequence[dict[str, torch.Tensor]], pad_id: int = 0, multiple: int = 1
) -> dict[str, torch.Tensor]:
    """Packs side by side, int64 [B, L] each, padded on the right to the longest and L to a `multiple`.

    Padding is a document of its own: `pad_id`, label -100, positions from 0.
    """
    import torch

    length = -(-max(len(item["input_ids"]) for item in batch) // multiple) * multiple
    out: dict[str, torch.Tensor] = {}
    for key in ("input_ids", "labels", "position_ids"):
        rows = []
        for item in batch:
            missing = length - len(item[key])
            fill = {"input_ids": pad_id, "labels": NOT_LEARNED}.get(key)
            pad = torch.arange(missing) if fill is None else torch.full((missing,), fill)
            rows.append(torch.cat([item[key], pad]))
        out[key] = torch.stack(rows)
    return out
