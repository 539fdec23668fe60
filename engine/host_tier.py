"""Which computed blocks lie in host memory, and who owns each of its slots.

Life of a slot
    1. Free.
    2. Written: `begin_save` gave it to a copy, and nobody finds it before `end_save` says that it
       holds the block, with the digest of what was written.
    3. Ready: found by hash. When a save needs a slot and none is free, the least recently used
       one goes; a parent is used at least whenever its child is.
    4. Read: `begin_load` gave it to a copy as well. It is found, and is not evicted before
       `end_load`.
    5. Dropped: forgotten, or out of reach because its parent is on no tier any more. It is found
       no more, and is free as soon as no copy reads or writes it.

At every moment free + written + ready + dropped and still in a copy == num_slots.

The last, partly filled block of a sequence that was preempted is private: its hash names it to
that sequence only, so the journal does not hear of it.

Pure: no memory, no clock.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from engine.prefix_cache import BlockAccountingError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as SequenceOf

    from cluster.prefix_hash import BlockHash
    from engine.cache_journal import CacheJournal


class HostEntry:
    """A block in, or on its way to, a slot. `digest` is that of its bytes once written."""

    __slots__ = (
        "block_hash",
        "digest",
        "is_dropped",
        "is_private",
        "is_written",
        "num_loads",
        "parent",
        "slot",
    )

    def __init__(
        self, slot: int, block_hash: BlockHash, parent: BlockHash | None, *, is_private: bool
    ) -> None:
        self.slot = slot
        self.block_hash = block_hash
        self.parent = parent
        self.is_private = is_private
        self.is_written = False
        self.is_dropped = False
        self.num_loads = 0
        self.digest = 0


class HostTier:
    """`num_slots` slots of one block each. Every call is O(1) per block it touches."""

    def __init__(self, num_slots: int, journal: CacheJournal) -> None:
        if num_slots < 1:
            raise ValueError("num_slots must be positive.")
        self.num_slots = num_slots
        self._journal = journal
        self._free = list(range(num_slots))[::-1]
        self._ready: OrderedDict[BlockHash, HostEntry] = OrderedDict()  # first out first
        self._written: dict[BlockHash, HostEntry] = {}
        self._dropped: set[HostEntry] = set()  # and still in a copy
        self._num_read = 0  # of the ready ones
        self._children: dict[BlockHash, set[BlockHash]] = {}  # of parents on any tier
        journal.before_going(self._drop_children)

    def __contains__(self, block_hash: BlockHash) -> bool:
        """Whether it can be found."""
        return block_hash in self._ready

    @property
    def num_ready(self) -> int:
        return len(self._ready)

    @property
    def num_moving(self) -> int:
        """Slots that a copy reads or writes."""
        return len(self._written) + len(self._dropped) + self._num_read

    @property
    def num_available(self) -> int:
        """Slots that saves could take now."""
        return len(self._free) + len(self._ready) - self._num_read

    def touch(self, block_hash: BlockHash) -> None:
        """It was used, maybe on another tier."""
        if block_hash in self._ready:
            self._ready.move_to_end(block_hash)

    def match(self, block_hashes: Iterable[BlockHash]) -> list[HostEntry]:
        """The longest run that can be found from the first hash on."""
        found = []
        for block_hash in block_hashes:
            entry = self._ready.get(block_hash)
            if entry is None:
                break
            found.append(entry)
        return found

    # ---- saves --------------------------------------------------------------------------

    def begin_save(
        self, block_hash: BlockHash, parent: BlockHash | None, *, is_private: bool = False
    ) -> HostEntry | None:
        """A slot to write the block to. None if it is here or on its way, or if every slot is in
        a copy."""
        if block_hash in self._ready or block_hash in self._written:
            return None
        if not self._free and not self._evict():
            return None
        entry = HostEntry(self._free.pop(), block_hash, parent, is_private=is_private)
        self._written[block_hash] = entry
        if parent is not None:
            self._children.setdefault(parent, set()).add(block_hash)
        return entry

    def end_save(self, entries: SequenceOf[HostEntry], digests: SequenceOf[int] | None) -> None:
        """They are written, or (None) not to be trusted. `entries`: children before parents."""
        for index in reversed(range(len(entries))):
            entry = entries[index]
            if entry.is_dropped:
                self._dropped.remove(entry)
                self._free.append(entry.slot)
                continue
            is_reachable = entry.parent is None or entry.parent in self._journal
            if digests is None or not is_reachable:
                self._drop(entry)
                self._dropped.remove(entry)
                self._free.append(entry.slot)
                continue
            del self._written[entry.block_hash]
            entry.is_written = True
            entry.digest = digests[index]
            self._ready[entry.block_hash] = entry
            if not entry.is_private:
                self._journal.stored(entry.block_hash)
        for entry in entries:
            self.touch(entry.block_hash)

    # ---- loads --------------------------------------------------------------------------

    def begin_load(self, entries: SequenceOf[HostEntry]) -> None:
        """A copy reads them. `entries`: as `match` gave them, parents before children."""
        for entry in reversed(entries):
            self._num_read += entry.num_loads == 0
            entry.num_loads += 1
            self._ready.move_to_end(entry.block_hash)

    def end_load(self, entries: Iterable[HostEntry]) -> None:
        for entry in entries:
            entry.num_loads -= 1
            if entry.num_loads > 0:
                continue
            if entry.is_dropped:
                self._dropped.remove(entry)
                self._free.append(entry.slot)
            else:
                self._num_read -= 1

    # ---- what is lost -------------------------------------------------------------------

    def forget(self, block_hashes: Iterable[BlockHash]) -> None:
        """Drop these and all that extend them, whatever copies them now."""
        self._drop_all(self._with_all_below(block_hashes))

    def clear(self) -> None:
        """Drop everything."""
        self._drop_all([*self._ready, *self._written])

    # ---- integrity ----------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise `BlockAccountingError` if the books do not balance. O(num_slots)."""
        entries = [*self._ready.values(), *self._written.values(), *self._dropped]
        slots = [*self._free, *(entry.slot for entry in entries)]
        if sorted(slots) != list(range(self.num_slots)):
            raise BlockAccountingError("Slots of host memory were lost or counted twice.")
        if self._num_read != sum(entry.num_loads > 0 for entry in self._ready.values()):
            raise BlockAccountingError("Slots of host memory that are read do not add up.")
        for entry in self._ready.values():
            if entry.parent is not None and entry.parent not in self._journal:
                raise BlockAccountingError("A block in host memory is out of reach.")
        linked = sum(len(children) for children in self._children.values())
        if linked != sum(e.parent is not None for e in entries if not e.is_dropped):
            raise BlockAccountingError("Blocks in host memory have lost their parents.")

    # ---- steps --------------------------------------------------------------------------

    def _evict(self) -> bool:
        """Drop the one that will be missed least. False if all are read."""
        for entry in self._ready.values():
            if entry.num_loads == 0:
                self._drop(entry)
                return True
        return False

    def _drop_children(self, block_hash: BlockHash) -> None:
        """No prompt can reach what is below it any more. Nor shall what is being written be found
        when that ends: if it goes because it cannot be trusted, another may have its name then."""
        self._drop_all(self._with_all_below([block_hash])[1:])

    def _with_all_below(self, block_hashes: Iterable[BlockHash]) -> list[BlockHash]:
        """These and all that extend them here, parents first."""
        found = list(block_hashes)
        for block_hash in found:
            found.extend(self._children.get(block_hash, ()))
        return found

    def _drop_all(self, block_hashes: SequenceOf[BlockHash]) -> None:
        """Those that are still here, the last first."""
        for block_hash in reversed(block_hashes):
            entry = self._ready.get(block_hash) or self._written.get(block_hash)
            if entry is not None:
                self._drop(entry)

    def _drop(self, entry: HostEntry) -> None:
        """Found no more. A copy that works on its slot keeps the slot until it ends."""
        entry.is_dropped = True
        block_hash, parent = entry.block_hash, entry.parent
        if parent is not None:
            siblings = self._children[parent]
            siblings.remove(block_hash)
            if not siblings:
                del self._children[parent]
        if not entry.is_written:
            del self._written[block_hash]
            self._dropped.add(entry)
            return
        del self._ready[block_hash]
        if entry.num_loads > 0:
            self._num_read -= 1
            self._dropped.add(entry)
        else:
            self._free.append(entry.slot)
        if not entry.is_private:
            self._journal.removed(block_hash)
