"""The book-keeping of the paged cache: which block is whose, and which content a block still holds.

A block is room for the keys and values of `size` tokens. A full block can be named by a key that stands
for its content and everything before it; whoever needs the same content later shares the block instead of
computing it. A block nobody uses keeps its content until it is taken for something else, the one unused
for longest first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Reference counts and contents of `count` blocks of `size` tokens."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._users = [0] * count
        self._keys: list[bytes | None] = [None] * count
        self._unused: OrderedDict[int, None] = OrderedDict((block, None) for block in range(count))
        self._by_key: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody uses, whether they still hold something or not."""
        return len(self._unused)

    def needed(self, tokens: int) -> int:
        """How many blocks so many tokens fill."""
        return -(-tokens // self.size)

    def users(self, block: int) -> int:
        """How many sequences use the block."""
        return self._users[block]

    def take(self, count: int) -> list[int]:
        """Blocks for new content, each with one user; their old content is forgotten."""
        assert count <= self.free, (count, self.free)
        taken = [self._unused.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._forget(block)
            self._users[block] = 1
        return taken

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks that hold the content of the keys, up to the first key that nobody knows."""
        found = []
        for key in keys:
            if key not in self._by_key:
                break
            found.append(self._by_key[key])
        return found

    def unused_among(self, blocks: Iterable[int]) -> int:
        """How many of the blocks would stop being free if they were shared."""
        return sum(self._users[block] == 0 for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """One more user for each of these blocks."""
        for block in blocks:
            self._users[block] += 1
            self._unused.pop(block, None)

    def name(self, block: int, key: bytes) -> None:
        """Say what a full block holds; the first block with a content keeps the name."""
        assert self._users[block], block
        if key not in self._by_key:
            self._by_key[key] = block
            self._keys[block] = key

    def release(self, blocks: Iterable[int]) -> None:
        """One user less for each block; of one sequence's blocks, in order, the last are reused first."""
        for block in reversed(list(blocks)):
            assert self._users[block] > 0, block
            self._users[block] -= 1
            if self._users[block] == 0:
                self._unused[block] = None
                self._unused.move_to_end(block, last=self._keys[block] is not None)

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._by_key[key]
            self._keys[block] = None


def chained(parent: bytes, *content: bytes | memoryview) -> bytes:
    """The key of a block from the key of the block before it and its own content."""
    digest = hashlib.blake2b(parent, digest_size=16)
    for part in content:
        digest.update(memoryview(part).nbytes.to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
