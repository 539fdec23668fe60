"""Launches of first steps that compute nothing, so that the next real one finds its code where it
left it.

A launch that follows another takes the host a tenth of a millisecond; after 50 ms of rest it takes
ten times as long: code, tables and the driver's calls have to come from far away again. Behind a
step on the device nobody sees that. But the first step of a sequence that arrives at an idle node
has nothing in front of it, and its client waits.

What is played is what a newcomer's first decode step takes but its graphs: a row, a plan of its
draws, the upload of both and of a block table, the way of tokens to the host. All of that has
memory of its own, so nothing of a real step is touched.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from cluster.prefix_hash import root_hash
from cluster.request import SamplingParams, SequenceRequest
from engine.sampler import Sampler
from engine.sequence import Sequence
from engine.step_rows import StepRows

if TYPE_CHECKING:
    from collections.abc import Iterator

_NUM_BLOCKS = 128  # of a prompt of some thousand tokens


class LaunchRehearsal:
    """Of one engine, on its thread."""

    def __init__(self, vocab_size: int, block_size: int, device: torch.device) -> None:
        self._rows = StepRows(1, _NUM_BLOCKS, block_size, device, None)
        self._sampler = Sampler(vocab_size, device, max_rows=1)
        self._newcomers: Iterator[Sequence] = itertools.cycle(
            [_newcomer(name, block_size) for name in ("rehearsal-0", "rehearsal-1")]
        )

    @torch.inference_mode()
    def play(self) -> None:
        """Queues little on the device and waits for nothing."""
        newcomer = next(self._newcomers)
        newcomer.sampling_row = None
        sequences = self._rows.arrange([newcomer])
        plan = self._sampler.plan_for(sequences)
        self._rows.send_decoding(plan, 1, is_steady=False, drawn_by=())
        self._sampler.send(1, plan, None)


def _newcomer(name: str, block_size: int) -> Sequence:
    request = SequenceRequest(
        sequence_id=name,
        request_id=name,
        prompt_token_ids=(0,),
        sampling=SamplingParams(max_tokens=2, seed=0),
    )
    sequence = Sequence(request, block_size=block_size, root=root_hash(name, b""))
    sequence.block_table = [0] * _NUM_BLOCKS
    return sequence
