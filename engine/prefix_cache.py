"""Which computed blocks can be found by content, and which of them to give up first.

Life of a cached block
    1. `register`: its KV is computed and its hash gets this name. Its parent is registered
       before it, so the registered blocks form a tree and a prompt's hits are one run.
    2. While sequences, holds or reservations refer to it, it is only found, never evicted.
    3. `park`: the last reference is gone. It may be evicted, or be `unpark`ed by a new hit.
    4. `evict` takes the least recently used block that no cached block extends (a leaf). A
       parent is used at least whenever its child is, so it goes after its children. Blocks that
       were saved elsewhere in that order go before those that would be lost.
    5. When a parent must go while somebody still refers to blocks below it, these lose their
       names with it: no prompt could reach them any more.

The journal hears of what is registered and forgotten, parents first and leaves first.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from collections.abc import Sequence as SequenceOf

    from cluster.prefix_hash import BlockHash
    from engine.cache_journal import CacheJournal


class BlockAccountingError(RuntimeError):
    """A block table, count or owner contradicts another: a bug of ours, never of a client."""


class Block:
    """The bookkeeping of one block of the pool. `block_hash` is None unless registered."""

    __slots__ = (
        "block_hash",
        "block_id",
        "children",
        "is_saved",
        "parent",
        "ref_count",
        "released_at",
    )

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        self.block_hash: BlockHash | None = None
        self.parent: Block | None = None
        self.children: set[Block] = set()
        self.released_at = 0
        self.is_saved = False


class PrefixCache:
    """The registered blocks as a tree by hash. Every operation on a block is O(1)."""

    def __init__(self, journal: CacheJournal) -> None:
        self._journal = journal
        self._blocks: dict[BlockHash, Block] = {}  # in order of registration: parents first
        self._leaves: OrderedDict[Block, None] = OrderedDict()  # parked, first out first
        self._saved: OrderedDict[Block, None] = OrderedDict()  # leaves that go before these
        self._num_saved = 0  # parked, leaves or not, that go before others
        self._inner: dict[Block, None] = {}  # parked, with registered children

    def __contains__(self, block_hash: BlockHash) -> bool:
        return block_hash in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def num_parked(self) -> int:
        """Blocks that nobody refers to. All of them can be evicted."""
        return len(self._leaves) + len(self._saved) + len(self._inner)

    @property
    def num_saved(self) -> int:
        """Parked blocks that go before others and are not lost then."""
        return self._num_saved

    def match(self, block_hashes: SequenceOf[BlockHash], limit: int) -> list[Block]:
        """The longest registered run from the first hash on, at most `limit` blocks."""
        found = []
        for block_hash in block_hashes[:limit]:
            block = self._blocks.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def register(self, block: Block, block_hash: BlockHash, parent: BlockHash | None) -> None:
        """Name a referenced block. `parent` is registered, or None for a first block."""
        if block.block_hash is not None or block_hash in self._blocks:
            raise BlockAccountingError(f"Block {block.block_id} or its hash is registered.")
        if parent is not None:
            block.parent = self._blocks[parent]
            self._leave_leaves(block.parent)
            block.parent.children.add(block)
        block.block_hash = block_hash
        self._blocks[block_hash] = block
        self._journal.stored(block_hash)

    def park(self, block: Block, now: int) -> None:
        """Nobody refers to this registered block any more. `now` counts releases."""
        block.released_at = now
        block.is_saved = False
        if block.children:
            self._inner[block] = None
        else:
            self._leaves[block] = None

    def park_saved(self, block: Block) -> None:
        """Nobody refers to it any more, and it was not used: it was saved elsewhere. Saved blocks
        go before all others, in the order in which they were saved."""
        block.is_saved = True
        self._num_saved += 1
        if block.children:
            self._inner[block] = None
        else:
            self._saved[block] = None

    def unpark(self, block: Block) -> None:
        """Somebody refers to it again."""
        self._num_saved -= block.is_saved
        if block.children:
            del self._inner[block]
        else:
            del self._leaves_of(block)[block]

    def evict(self) -> list[Block]:
        """Forget the block that will be missed least. Returns the blocks now free, >= 1 of
        them; some block must be parked."""
        leaves = self._saved or self._leaves
        if leaves:
            block, _ = leaves.popitem(last=False)
            self._num_saved -= block.is_saved
            self._unregister(block)
            return [block]
        return self._unregister_tree(next(iter(self._inner)))

    def forget(self, block_hashes: Iterable[BlockHash]) -> list[Block]:
        """Forget these blocks and all that extend them. Returns the parked ones, now free."""
        free = []
        for block_hash in block_hashes:
            block = self._blocks.get(block_hash)
            if block is not None:
                free += self._unregister_tree(block)
        return free

    def clear(self) -> list[Block]:
        """Forget everything. Returns the parked blocks, now free."""
        free = [*self._saved, *self._leaves, *self._inner]
        for block in reversed(self._blocks.values()):
            self._journal.removed(hash_of(block))
            block.block_hash = block.parent = None
            block.children.clear()
        self._blocks.clear()
        self._leaves.clear()
        self._saved.clear()
        self._num_saved = 0
        self._inner.clear()
        return free

    def parked(self) -> Iterator[Block]:
        yield from self._leaves
        yield from self._saved
        yield from self._inner

    def check_integrity(self) -> None:
        """Raise `BlockAccountingError` if the tree contradicts itself. O(cached blocks)."""
        for block_hash, block in self._blocks.items():
            parent = block.parent
            _require(block.block_hash == block_hash, f"{block.block_id} has another hash")
            if parent is not None:
                _require(block in parent.children, f"{block.block_id} unknown to its parent")
                _require(parent.block_hash in self._blocks, f"{block.block_id} is unreachable")
            for child in block.children:
                _require(child.parent is block, f"{child.block_id} has another parent")
        num_saved = sum(block.is_saved for block in self.parked())
        _require(num_saved == self._num_saved, f"count of saved ones is not {num_saved}")
        for block in (*self._leaves, *self._saved):
            _require(not block.children, f"{block.block_id} is no leaf")
        for block in self._inner:
            _require(bool(block.children), f"{block.block_id} is a leaf")
        for block in self.parked():
            _require(block.ref_count == 0, f"{block.block_id} is parked and referenced")
            _require(block.block_hash in self._blocks, f"{block.block_id} parked unregistered")

    def _unregister(self, block: Block) -> None:
        """Forget one block without children; it is no longer parked."""
        block_hash = hash_of(block)
        del self._blocks[block_hash]
        self._journal.removed(block_hash)
        block.block_hash = None
        parent, block.parent = block.parent, None
        if parent is not None:
            parent.children.remove(block)
            self._join_leaves(parent, after=block)

    def _unregister_tree(self, root: Block) -> list[Block]:
        """Forget a block and all below it, children first. Returns the parked ones."""
        below = [root]
        for block in below:
            below.extend(block.children)
        free = []
        for block in reversed(below):
            if block.ref_count == 0:
                self.unpark(block)
                free.append(block)
            self._unregister(block)
        return free

    def _leave_leaves(self, block: Block) -> None:
        """It is about to get a child."""
        if not block.children and block in self._leaves_of(block):
            del self._leaves_of(block)[block]
            self._inner[block] = None

    def _join_leaves(self, block: Block, *, after: Block) -> None:
        """It lost a child, maybe its last. Released together with it, it is next to go; used
        since without the child, it has a second turn."""
        if block.children or block not in self._inner:
            return
        del self._inner[block]
        leaves = self._leaves_of(block)
        leaves[block] = None
        if block.released_at <= after.released_at:
            leaves.move_to_end(block, last=False)

    def _leaves_of(self, block: Block) -> OrderedDict[Block, None]:
        return self._saved if block.is_saved else self._leaves


def hash_of(block: Block) -> BlockHash:
    """Of a registered block."""
    if block.block_hash is None:
        raise BlockAccountingError(f"Block {block.block_id} is not registered.")
    return block.block_hash


def _require(is_true: bool, problem: str) -> None:
    if not is_true:
        raise BlockAccountingError(f"Prefix cache: block {problem}.")
