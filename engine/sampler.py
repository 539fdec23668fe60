"""Next tokens from logits.

Life of a row in one step
    1. Its logits are changed: penalties, biases, and, below `min_tokens`, bans of the tokens
       that would end it.
    2. Its best token is found. Temperature 0 takes it. A best logit that is no finite number
       ends this sequence with an error, and no other.
    3. Else a token is drawn: temperature, then `min_p`, `top_k`, `top_p`, then the number that
       belongs to (seed, position) decides. `position` is the index the new token will take.
    4. Log-probabilities, where wanted, are those of the unchanged logits.
    5. The token stays on the device, where the next step may take it from, and travels to the
       host behind the step. `Draws.tokens` waits for that, and for nothing else.

A row's outcome depends on its own logits, tokens and parameters, never on its neighbours. Only
penalties depend on the values of earlier tokens; of the one that a running step draws they learn
on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from cluster.errors import InternalError
from engine.logprobs import logprob_table, read_logprobs
from engine.penalties import TokenEdits, apply_penalties
from engine.sampling_plan import SamplingPlan, SamplingRow
from kernels.sample import NO_TOKEN, DrawParams, SampleWorkspace, sample

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as SequenceOf

    from cluster.errors import ServingError
    from cluster.request import TokenLogprobs
    from engine.sequence import Sequence

_NUM_STAGED = 3  # steps whose tokens may be on their way to the host, and one to spare


class SampledToken(NamedTuple):
    """One row's outcome. With an `error` there is no token: `token_id` is -1, and the
    sequence ends with that error while its neighbours go on."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: ServingError | None = None


class Draws:
    """The tokens of one step, on their way from the device."""

    __slots__ = ("_logprobs", "_plan", "_tokens", "event")

    def __init__(
        self,
        tokens: torch.Tensor,
        plan: SamplingPlan,
        logprobs: torch.Tensor | None,
        event: torch.Event | None,
    ) -> None:
        self._tokens = tokens
        self._plan = plan
        self._logprobs = logprobs
        self.event = event

    def wait(self) -> None:
        """Until the tokens are here; then the whole step has been computed."""
        if self.event is not None:
            self.event.synchronize()

    def tokens(self) -> list[int]:
        """`NO_TOKEN` where there is none."""
        self.wait()
        token_ids: list[int] = self._tokens.tolist()
        return token_ids

    def logprobs(self) -> dict[int, TokenLogprobs]:
        """By row, for those that want them. After `tokens`."""
        if self._logprobs is None:
            return {}
        plan = self._plan
        lines = zip(self._logprobs.numpy(), plan.num_wanted_logprobs.items(), strict=True)
        return {
            place: read_logprobs(line, plan.num_top_logprobs, num_wanted)
            for line, (place, num_wanted) in lines
        }


class Sampler:
    """Draws one token for each row of logits, of up to `max_rows` rows."""

    def __init__(
        self,
        vocab_size: int,
        device: torch.device,
        *,
        eos_token_ids: Iterable[int] = (),
        max_rows: int,
    ) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._eos_token_ids = frozenset(eos_token_ids)
        self._plan = SamplingPlan([], device)
        self._turn = 0
        self._on_gpu = device.type == "cuda"
        staged = _NUM_STAGED if self._on_gpu else 1
        # Where the step that was launched last leaves its tokens, by row.
        self.drawn = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._staged = torch.empty(staged, max_rows, dtype=torch.int64, pin_memory=self._on_gpu)
        self.workspace = SampleWorkspace(max_rows, vocab_size, device) if self._on_gpu else None

    def plan_for(self, sequences: SequenceOf[Sequence]) -> SamplingPlan:
        rows = [sequence.sampling_row or self._row_of(sequence) for sequence in sequences]
        if rows != self._plan.rows:
            self._plan = SamplingPlan(rows, self._device)
        return self._plan

    def host_params(self, plan: SamplingPlan, positions: np.ndarray) -> DrawParams:
        """The rows' parameters as CPU tensors. `positions` int64 [n]."""
        arrays = (plan.scale, plan.min_p, plan.top_p, plan.top_k, plan.seeds, positions)
        return DrawParams(*map(torch.from_numpy, arrays))

    def draw(self, logits: torch.Tensor, params: DrawParams, *, only_best: bool = False) -> None:
        """Draw from logits `[n, vocab]`, any float type, into `drawn`. Captured in graphs: reads
        nothing on the host when on a GPU. `only_best`: no row has a temperature."""
        sample(
            logits,
            params,
            out=self.drawn[: len(logits)],
            workspace=self.workspace,
            only_best=only_best,
        )

    def draw_changed(
        self,
        plan: SamplingPlan,
        sequences: SequenceOf[Sequence],
        params: DrawParams,
        logits: torch.Tensor,
        sources: torch.Tensor,
    ) -> torch.Tensor | None:
        """Draw from `logits` as the plan changes them, row i for `sequences[i]`.

        `sources` int32 [n]: the row of `drawn` that holds the sequence's last token, -1 where the
        sequence has it. Returns the table of log-probabilities if some are wanted.
        """
        raw = logits.float()
        changed = self._change(raw, plan, sequences, sources)
        self.draw(changed, params, only_best=plan.only_best)
        if not plan.num_wanted_logprobs:
            return None
        rows = plan.logprob_rows
        chosen = self.drawn[rows].clamp(min=0)
        return logprob_table(raw[rows], chosen, plan.num_top_logprobs)

    def send(self, num_rows: int, plan: SamplingPlan, logprobs: torch.Tensor | None) -> Draws:
        """Send what was drawn last, of the first `num_rows` rows, to the host."""
        if not self._on_gpu:
            return Draws(self.drawn[:num_rows].clone(), plan, logprobs, None)
        self._turn = (self._turn + 1) % _NUM_STAGED
        staged = self._staged[self._turn, :num_rows]
        staged.copy_(self.drawn[:num_rows], non_blocking=True)
        if logprobs is not None:
            table = torch.empty(logprobs.shape, dtype=logprobs.dtype, pin_memory=True)
            logprobs = table.copy_(logprobs, non_blocking=True)
        event = torch.Event(self._device)
        event.record()
        return Draws(staged, plan, logprobs, event)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> list[SampledToken]:
        """Draw and wait: for `logits` [n, vocab] whose row i is of `sequences[i]`. Changes
        neither `logits` nor the sequences' tokens."""
        if not sequences:
            return []
        plan = self.plan_for(sequences)
        positions = np.array([len(each.token_ids) for each in sequences], np.int64)
        params = self.host_params(plan, positions)
        if self._on_gpu:
            params = DrawParams(*(each.to(self._device) for each in params))
        sources = torch.full((len(sequences),), -1, dtype=torch.int32, device=self._device)
        table = self.draw_changed(plan, sequences, params, logits.contiguous(), sources)
        draws = self.send(len(sequences), plan, table)
        tokens = draws.tokens()
        logprobs = draws.logprobs()
        return [
            SampledToken(token_id, logprobs.get(row))
            if token_id != NO_TOKEN
            else SampledToken(NO_TOKEN, error=not_finite())
            for row, token_id in enumerate(tokens)
        ]

    def _row_of(self, sequence: Sequence) -> SamplingRow:
        row = SamplingRow(
            sequence.sampling,
            sequence.token_ids,
            sequence.num_prompt_tokens,
            vocab_size=self._vocab_size,
            eos_token_ids=self._eos_token_ids,
        )
        sequence.sampling_row = row
        return row

    def _change(
        self,
        raw: torch.Tensor,
        plan: SamplingPlan,
        sequences: SequenceOf[Sequence],
        sources: torch.Tensor,
    ) -> torch.Tensor:
        """The logits after penalties, biases and bans; `raw` itself if there are none."""
        bans = {
            place: banned
            for place, banned in plan.bannable.items()
            if _num_drawn(sequences[place]) < plan.rows[place].sampling.min_tokens
        }
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
            source = sources[plan.penalized_rows].long()
            pending = torch.where(source >= 0, self.drawn[source.clamp(min=0)], NO_TOKEN)
            apply_penalties(changed, plan.penalized, counts, plan.strengths, pending)
        if plan.bias is not None:
            plan.bias.add_to(changed)
        if bans:
            TokenEdits(bans, self._device).replace_in(changed)
        return changed


def _num_drawn(sequence: Sequence) -> int:
    """Output tokens it has, with one that is still on the device."""
    return sequence.num_output_tokens + sequence.num_launched_draws


def not_finite() -> InternalError:
    return InternalError("The model computed no usable logits.", reason="logits_not_finite")
