"""The block pool against a model of it that remembers everything."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ernietune.infer.blocks import BlockPool, chained

SIZE, COUNT = 2, 6
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=10)


def keys(tokens: list[int]) -> list[bytes]:
    """One key per full block."""
    chain = [b""]
    for start in range(0, len(tokens) - SIZE + 1, SIZE):
        chain.append(chained(chain[-1], bytes(tokens[start : start + SIZE])))
    return chain[1:]


class PoolMachine(RuleBasedStateMachine):
    """Sequences come, share what is there, write the rest, grow and go."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(COUNT, SIZE)
        self.tables: list[tuple[list[int], list[int]]] = []  # (tokens, blocks)
        self.written: dict[int, list[int]] = {}  # what every block really holds

    @rule(tokens=TOKENS)
    def start(self, tokens: list[int]) -> None:
        shared = self.pool.find(keys(tokens))
        needed = self.pool.needed(len(tokens)) - len(shared)
        if needed + self.pool.unused_among(shared) > self.pool.free:
            return
        for index, block in enumerate(shared):
            assert self.written[block] == tokens[: (index + 1) * SIZE], "another content under this key"
        self.pool.share(shared)
        blocks = shared + self.pool.take(needed)
        self._write(tokens, blocks, len(shared))
        self.tables.append((list(tokens), blocks))

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 100), token=st.integers(0, 1))
    def grow(self, which: int, token: int) -> None:
        tokens, blocks = self.tables[which % len(self.tables)]
        if len(tokens) == len(blocks) * SIZE:
            if not self.pool.free:
                return
            blocks += self.pool.take(1)
        tokens.append(token)
        self._write(tokens, blocks, (len(tokens) - 1) // SIZE)

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 100))
    def end(self, which: int) -> None:
        _, blocks = self.tables.pop(which % len(self.tables))
        self.pool.release(blocks)

    def _write(self, tokens: list[int], blocks: list[int], first: int) -> None:
        for index in range(first, len(blocks)):
            assert self.pool.users(blocks[index]) == 1, "a shared block is overwritten"
            self.written[blocks[index]] = tokens[: (index + 1) * SIZE]
        for index, key in list(enumerate(keys(tokens)))[first:]:
            self.pool.name(blocks[index], key)

    @invariant()
    def users_are_counted(self) -> None:
        users = Counter(block for _, blocks in self.tables for block in blocks)
        assert [self.pool.users(block) for block in range(COUNT)] == [users[block] for block in range(COUNT)]
        assert self.pool.free == COUNT - len(users)

    @invariant()
    def nobody_lost_what_he_wrote(self) -> None:
        for tokens, blocks in self.tables:
            for index, block in enumerate(blocks):
                assert self.written[block] == tokens[: (index + 1) * SIZE]

    def teardown(self) -> None:
        for _, blocks in self.tables:
            self.pool.release(blocks)
        assert self.pool.free == COUNT
        assert len(self.pool.take(COUNT)) == COUNT


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


def test_a_released_block_is_found_until_it_is_needed() -> None:
    pool = BlockPool(3, SIZE)
    first, second = keys([1, 2, 3, 4])
    blocks = pool.take(2)
    pool.name(blocks[0], first)
    pool.name(blocks[1], second)
    pool.release(blocks)
    assert pool.find([first, second]) == blocks
    pool.take(1)  # the third block was never used
    assert pool.find([first, second]) == blocks
    pool.take(1)  # now the end of the chain has to go, its beginning stays
    assert pool.find([first, second]) == blocks[:1]


def test_a_key_depends_on_all_that_came_before() -> None:
    assert keys([1, 2, 3, 4])[1] != keys([9, 2, 3, 4])[1]
    assert keys([1, 2, 3, 4])[0] == keys([1, 2, 9, 9])[0]
    assert chained(b"", b"ab", b"c") != chained(b"", b"a", b"bc")
