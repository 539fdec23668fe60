"""The rows of a decode step, as the host sends them: who has which, where it stands, how it draws.

Two kinds of step have rows: one of decoding sequences, which keep theirs from step to step
(`decode_rows.py`), so that little has to be said, and one of short ends of prompts
(`prompt_rows.py`), which overwrite the tables of the first rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engine.decode_rows import DecodeRows, TableChange
from engine.prompt_rows import tables_of
from engine.row_inputs import RowInputs
from engine.tensor_parallel.wire import StepHeader

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    import torch

    from engine.prompt_rows import PromptRow
    from engine.row_inputs import HostRows
    from engine.sampling_plan import SamplingPlan
    from engine.sequence import Sequence
    from engine.tensor_parallel.wire import Announce


class StepRows:
    """`inputs` is where the model finds them on the device."""

    def __init__(
        self,
        max_rows: int,
        max_blocks: int,
        block_size: int,
        device: torch.device,
        announce: Announce | None,
    ) -> None:
        self.inputs = RowInputs(max_rows, max_blocks, device)
        self._block_size = block_size
        self._announce = announce
        self._rows = DecodeRows(max_rows)
        self._ends = np.zeros(max_rows, np.int64)  # of the rows of the last decode step

    def arrange(self, sequences: SequenceOf[Sequence]) -> list[Sequence]:
        """The same in the order of their rows; the same list if they are those of the last step."""
        self._rows.arrange(sequences)
        return self._rows.sequences

    def send_decoding(
        self,
        plan: SamplingPlan,
        num_rows: int,
        *,
        is_steady: bool,
        drawn_by: SequenceOf[Sequence],
    ) -> None:
        """Queue the rows that were arranged, with padding up to `num_rows`.

        `drawn_by`: the sequences of the last step's draws. `is_steady`: they are these, and that
        step is in flight.
        """
        sequences = self._rows.sequences
        num_seqs = len(sequences)
        ends = self._ends[:num_seqs]
        if is_steady:
            ends += 1
            changes = self._rows.growth((ends - 1) // self._block_size)
        else:
            ends[:] = [s.num_computed_tokens + s.num_launched_tokens + 1 for s in sequences]
            changes = self._rows.all_changes()
        last_part = self._send_all_but_last(changes)
        rows = self.inputs.next_rows()
        rows.ends[:num_seqs] = ends
        if is_steady:
            rows.sources[:num_seqs] = np.arange(num_seqs)
        else:
            _set_tokens(rows, sequences, drawn_by)
        rows.set_params(plan)
        rows.pad(num_seqs, num_rows)
        self._send(num_rows, num_seqs, last_part)

    def send_prompts(
        self, plan: SamplingPlan, num_rows: int, prompt_rows: SequenceOf[PromptRow]
    ) -> None:
        """The same of ends of prompts. The first rows draw, as the plan says."""
        num_used = len(prompt_rows)
        self._rows.overwritten(num_used)
        last_part = self._send_all_but_last(tables_of(prompt_rows, self._block_size))
        rows = self.inputs.next_rows()
        rows.pad(0, num_rows)
        rows.ends[:num_used] = [row.end for row in prompt_rows]
        rows.tokens[:num_used] = [row.token_id for row in prompt_rows]
        rows.set_params(plan)
        self._send(num_rows, num_used, last_part)

    def _send_all_but_last(self, changes: SequenceOf[TableChange]) -> SequenceOf[TableChange]:
        """Queue the parts of changes that go before the rows. Returns the one that goes with
        them."""
        *first_parts, last_part = self.inputs.split(changes)
        for part in first_parts:
            self.inputs.next_rows()
            self._send(0, 0, part)
        return last_part

    def _send(self, num_rows: int, num_seqs: int, changes: SequenceOf[TableChange]) -> None:
        num_entries = self.inputs.set_changes(changes)
        if self._announce is not None:
            header = StepHeader(True, num_rows, num_rows, num_seqs, num_entries, 1)
            self._announce(header, self.inputs.filled(num_entries))
        self.inputs.upload(num_entries)


def _set_tokens(
    rows: HostRows, sequences: SequenceOf[Sequence], drawn_by: SequenceOf[Sequence]
) -> None:
    """Each row's token, or where the step that still runs leaves it."""
    row_of: dict[Sequence, int] = {}
    if any(each.num_launched_draws for each in sequences):
        row_of = {each: row for row, each in enumerate(drawn_by)}
    rows.tokens[: len(sequences)] = [each.token_ids[-1] for each in sequences]
    rows.sources[: len(sequences)] = [
        row_of[each] if each.num_launched_draws else -1 for each in sequences
    ]
