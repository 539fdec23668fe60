"""Next tokens from logits.

Life of a row in one step
    1. Its logits are changed: penalties, biases, and, below `min_tokens`, bans of the tokens
       that would end it.
    2. Its best token is found. Temperature 0 takes it. A best logit that is no finite number
       ends this sequence with an error, and no other.
    3. Else a token is drawn: temperature, then `min_p`, `top_k`, `top_p`, then the number that
       belongs to (seed, position) decides. `position` is the index the new token will take.
    4. Log-probabilities, where wanted, are those of the unchanged logits.
    5. All rows' outcomes leave the device in one copy. Only if a nucleus was larger than
       expected there is a second.

A row's outcome depends on its own logits, tokens and parameters, never on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from cluster.errors import InternalError
from engine.draw import draw_any, draw_filtered, token_weights
from engine.logprobs import logprob_table, read_logprobs
from engine.penalties import TokenEdits, apply_penalties
from engine.randomness import uniforms
from engine.sampling_plan import SamplingPlan, SamplingRow

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as SequenceOf

    import numpy.typing as npt

    from cluster.errors import ServingError
    from cluster.request import TokenLogprobs
    from engine.sampling_plan import DrawGroup
    from engine.sequence import Sequence

_MAX_ELEMENTS = 1 << 24  # logits drawn from at once: bounds the workspace to about 0.5 GB
_NO_TOKEN = -1


class SampledToken(NamedTuple):
    """One row's outcome. With an `error` there is no token: `token_id` is -1, and the
    sequence ends with that error while its neighbours go on."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: ServingError | None = None


class Sampler:
    """Draws one token for each row of logits."""

    def __init__(
        self, vocab_size: int, device: torch.device, *, eos_token_ids: Iterable[int] = ()
    ) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._eos_token_ids = frozenset(eos_token_ids)
        self._plan = SamplingPlan([], device)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> list[SampledToken]:
        """`logits` [n, vocab] of any float type, row i for `sequences[i]`, whose `token_ids` do
        not hold the new token yet. Changes neither `logits` nor the sequences' tokens."""
        if not sequences:
            return []
        plan = self._plan_for(sequences)
        raw = logits.detach().float()
        if plan.is_plain:
            best, token_ids = _best(raw)
            return _plain_outcomes(torch.where(best.isfinite(), token_ids, _NO_TOKEN).tolist())
        changed = self._change(raw, plan, sequences)
        best, token_ids = _best(changed)
        step = _Step(raw, changed, best, token_ids, torch.ones_like(token_ids, dtype=torch.bool))
        draws = [_Draw(group, sequences) for group in plan.groups]
        for draw in draws:
            draw.run(step)
        host = step.collect(plan)
        lacking = host.lacking()
        if lacking.size:
            for draw in draws:
                draw.run_again(step, lacking)
            host = step.collect(plan)
        return host.outcomes(plan)

    def _plan_for(self, sequences: SequenceOf[Sequence]) -> SamplingPlan:
        rows = [sequence.sampling_row or self._row_of(sequence) for sequence in sequences]
        if rows != self._plan.rows:
            self._plan = SamplingPlan(rows, self._device)
        return self._plan

    def _row_of(self, sequence: Sequence) -> SamplingRow:
        row = SamplingRow(sequence, self._vocab_size, self._eos_token_ids)
        sequence.sampling_row = row
        return row

    def _change(
        self, raw: torch.Tensor, plan: SamplingPlan, sequences: SequenceOf[Sequence]
    ) -> torch.Tensor:
        """The logits after penalties, biases and bans; `raw` itself if there are none."""
        bans = [
            (place, [(token_id, -torch.inf) for token_id in plan.rows[place].banned_token_ids])
            for place in plan.bannable
            if sequences[place].num_output_tokens < plan.rows[place].sampling.min_tokens
        ]
        if not (plan.penalized or plan.bias or bans):
            return raw
        changed = raw.clone()
        if plan.penalized:
            counts = []
            for place in plan.penalized:
                count = plan.rows[place].counts
                if count is not None:
                    count.update(sequences[place].token_ids)
                    counts.append(count)
            apply_penalties(changed, plan.penalized, counts, plan.strengths)
        if plan.bias is not None:
            plan.bias.add_to(changed)
        if bans:
            TokenEdits(bans, self._device).replace_in(changed)
        return changed


@dataclass(slots=True)
class _Step:
    """The rows of one step on the device: logits float32 [n, vocab], all others [n]."""

    raw: torch.Tensor
    changed: torch.Tensor
    best: torch.Tensor  # float32, the maxima of `changed`
    token_ids: torch.Tensor  # int64, the best; draws overwrite theirs
    is_enough: torch.Tensor  # bool, False where a draw must look at more candidates

    def collect(self, plan: SamplingPlan) -> _Host:
        """The one copy from the device: everything as float64, which holds ids exactly."""
        parts = [
            torch.where(self.best.isfinite(), self.token_ids, _NO_TOKEN).double(),
            self.is_enough.double(),
        ]
        if plan.logprob_places:
            rows = plan.logprob_rows
            table = logprob_table(self.raw[rows], self.token_ids[rows], plan.num_top_logprobs)
            parts.append(table.flatten())
        flat = torch.cat(parts).cpu().numpy()
        num_rows = len(self.token_ids)
        return _Host(
            flat[:num_rows].astype(np.int64),
            flat[num_rows : 2 * num_rows] != 0.0,
            flat[2 * num_rows :].reshape(len(plan.logprob_places), -1)
            if plan.logprob_places
            else None,
        )


@dataclass(slots=True)
class _Host:
    """What one step decided, read from the device."""

    token_ids: npt.NDArray[np.int64]
    is_enough: npt.NDArray[np.bool_]
    logprobs: npt.NDArray[np.float64] | None

    def lacking(self) -> npt.NDArray[np.int64]:
        """Places of rows whose draw is not decided."""
        return np.flatnonzero(~self.is_enough & (self.token_ids != _NO_TOKEN))

    def outcomes(self, plan: SamplingPlan) -> list[SampledToken]:
        outcomes = _plain_outcomes(self.token_ids.tolist())
        if self.logprobs is None:
            return outcomes
        for line, (place, num_wanted) in zip(
            self.logprobs, plan.num_wanted_logprobs.items(), strict=True
        ):
            if outcomes[place].error is None:
                logprobs = read_logprobs(line, plan.num_top_logprobs, num_wanted)
                outcomes[place] = outcomes[place]._replace(logprobs=logprobs)
        return outcomes


class _Draw:
    """The draws of one group in one step."""

    __slots__ = ("_group", "_points")

    def __init__(self, group: DrawGroup, sequences: SequenceOf[Sequence]) -> None:
        self._group = group
        positions = [len(sequences[place].token_ids) for place in group.places.tolist()]
        points = uniforms(group.seeds, np.array(positions, np.uint64))
        self._points = torch.from_numpy(points).unsqueeze(1).to(group.rows.device)

    def run(self, step: _Step) -> None:
        members = torch.arange(len(self._group.rows), device=step.token_ids.device)
        self._in_passes(step, members, self._group.num_candidates)

    def run_again(self, step: _Step, lacking: npt.NDArray[np.int64]) -> None:
        """Draw the rows at these places of the batch with the whole vocabulary as candidates."""
        members = torch.from_numpy(np.flatnonzero(np.isin(self._group.places, lacking)))
        self._in_passes(step, members.to(step.token_ids.device), step.changed.shape[-1])

    def _in_passes(self, step: _Step, members: torch.Tensor, num_candidates: int) -> None:
        for part in torch.split(members, max(1, _MAX_ELEMENTS // step.changed.shape[-1])):
            if len(part):
                self._draw(step, part, num_candidates)

    def _draw(self, step: _Step, part: torch.Tensor, num_candidates: int) -> None:
        group = self._group
        rows = group.rows[part]
        is_whole = len(part) == len(step.changed)  # then a copy can be saved
        logits = step.changed if is_whole else step.changed[rows]
        min_p = None if group.min_p is None else group.min_p[part]
        best = step.best[rows].unsqueeze(1)
        weights = token_weights(logits, best, group.temperature[part], min_p)
        if group.top_k is None or group.top_p is None:
            step.token_ids[rows] = draw_any(weights, self._points[part])
            return
        step.token_ids[rows], step.is_enough[rows] = draw_filtered(
            weights, self._points[part], group.top_k[part], group.top_p[part], num_candidates
        )


def _best(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row maxima and their first ids; a row with a NaN has NaN."""
    if logits.device.type != "cpu":
        best, token_ids = logits.max(dim=-1)
        return best, token_ids
    # Ten times faster than torch, which does not vectorise this on a CPU.
    array = logits.numpy()
    ids = array.argmax(axis=-1)
    return torch.from_numpy(array[np.arange(len(ids)), ids]), torch.from_numpy(ids)


def _plain_outcomes(token_ids: list[int]) -> list[SampledToken]:
    return [
        SampledToken(token_id) if token_id != _NO_TOKEN else _failed() for token_id in token_ids
    ]


def _failed() -> SampledToken:
    error = InternalError("The model computed no usable logits.", reason="logits_not_finite")
    return SampledToken(_NO_TOKEN, error=error)
