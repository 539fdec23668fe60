"""Runs a decision through the model: inputs, forward pass, draws of the sampled rows.

Life of a decode step
    1. Its sequences get rows. What the host knows of them (positions, how they are drawn, new
       entries of block tables) is uploaded in one copy. A token that a step still running draws
       is not known: the row says which of that step's rows to take it from.
    2. A captured graph makes the inputs of the rows, on the device, and runs all layers; a
       second one computes the logits and draws. On a CPU, without graphs and where a step is
       too large for them, the same is run call by call.
    3. The tokens stay on the device for the next step, and travel to the host behind this one.

Nothing here waits for the device. A step that computes chunks of prompts runs call by call, and
its tokens are drawn in the same way; but where the chunks are few tokens, each is a row of a decode
step (`prompt_rows.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.batch import Batch, BatchBuilder, table_width
from engine.cuda_graphs import DecodeGraphs, capture_sizes
from engine.decode_rows import TableChange
from engine.prompt_rows import MAX_READ_BYTES, rows_of
from engine.step_rows import StepRows
from kernels.decode_inputs import DecodeInputs, fill_decode_inputs

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf

    from cluster.startup import StartupReport
    from engine.kv_cache import KVCache
    from engine.limits import EngineLimits
    from engine.models.decoder import Decoder
    from engine.prompt_rows import PromptRow
    from engine.sampler import Draws, Sampler
    from engine.sampling_plan import SamplingPlan
    from engine.schedule import ScheduledChunk
    from engine.sequence import Sequence
    from engine.tensor_parallel.wire import Announce, StepHeader


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """`sampled[i]` is the sequence of draw i. `draws` is None if there are none. `done` (GPU): the
    KV is written."""

    sampled: SequenceOf[Sequence]
    draws: Draws | None
    done: torch.Event | None


class ModelRunner:
    """One model over one KV pool. Not thread-safe; calls run under `torch.inference_mode`."""

    def __init__(
        self,
        decoder: Decoder,
        kv_cache: KVCache,
        limits: EngineLimits,
        sampler: Sampler | None,
        announce: Announce | None = None,
    ) -> None:
        """`sampler`: None on a rank that draws nothing. `announce`: tells the other ranks of the
        same model what to run."""
        self._decoder = decoder
        self._kv_layers = kv_cache.layers
        self._limits = limits
        self._block_size = kv_cache.layout.block_size
        self._max_read_tokens = MAX_READ_BYTES * self._block_size // kv_cache.layout.block_bytes
        self.max_prompt_rows = 0  # without graphs nothing is gained
        self._sampler = sampler
        device, num_rows = limits.device, limits.max_num_seqs
        max_blocks = table_width(-(-limits.max_model_len // self._block_size))
        self._batches = BatchBuilder(
            block_size=self._block_size,
            max_num_seqs=num_rows,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_model_len=limits.max_model_len,
            device=device,
            announce=announce,
        )
        self._rows = StepRows(num_rows, max_blocks, self._block_size, device, announce)
        self._inputs = self._rows.inputs
        self._drawn_by: SequenceOf[Sequence] = ()  # the sequences of the last step's draws
        self._plan: SamplingPlan | None = None
        self._no_seqlens = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
        self._none_drawn = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._decode_inputs = DecodeInputs.empty(num_rows, device)
        self._graphs: DecodeGraphs | None = None

    def capture_graphs(self, progress: StartupReport, sizes: SequenceOf[int] | None = None) -> None:
        """From now on decode steps replay graphs. GPU only. `sizes`: numbers of rows, rising."""
        self._inputs.next_rows().pad(0, self._limits.max_num_seqs)
        # A change that changes nothing: the kernel that writes changes is compiled now.
        self._inputs.upload(self._inputs.set_changes([TableChange(0, 0, [0])]))
        self._graphs = DecodeGraphs(
            self._forward_rows,
            self._draw,
            sizes=sizes or capture_sizes(self._limits.max_graph_rows),
            device=self._limits.device,
        )
        self._graphs.capture(progress)
        self.max_prompt_rows = self._graphs.max_rows

    def launch(
        self,
        chunks: SequenceOf[ScheduledChunk],
        *,
        is_decode: bool,
        follows: bool,
        on_layer: Callable[[int], None] | None = None,
    ) -> LaunchedStep:
        """Queue a step. `follows`: the step launched before it is not collected yet.

        `is_decode`: each chunk is the last token of its sequence. `on_layer(i)` is called when
        the KV of layer i is written (on a GPU: when the kernels that write it are queued on the
        current stream).
        """
        if is_decode:
            return self._launch_decode([each.sequence for each in chunks], follows, on_layer)
        return self._launch_prefill(chunks, on_layer)

    def wait(self) -> None:
        """Until the device has computed all that this thread has queued."""
        if self._limits.on_gpu:
            torch.cuda.current_stream(self._limits.device).synchronize()

    def follow(self, header: StepHeader, fill: Callable[[memoryview], None]) -> None:
        """Run what rank 0 announced, as it does; `fill` writes the packed inputs."""
        if not header.is_decode:
            batch = self._batches.receive(header, fill)
            hidden = self._decoder.forward(batch, self._kv_layers)
            if hidden is not None:
                self._decoder.logits(hidden)
            return
        num_entries = header.table_width
        self._inputs.next_rows()
        fill(self._inputs.filled(num_entries))
        self._inputs.upload(num_entries)
        if header.num_rows:
            hidden = self._run_rows(header.num_rows, None)
            self._draw_rows(hidden, only_best=True)  # the logits are all that others compute

    # ---- decode ----------------------------------------------------------------------------

    def _launch_decode(
        self,
        sequences: SequenceOf[Sequence],
        follows: bool,
        on_layer: Callable[[int], None] | None,
    ) -> LaunchedStep:
        sampler = self._drawing()
        sequences = self._rows.arrange(sequences)
        is_steady = follows and sequences is self._drawn_by
        plan = self._plan if is_steady else None
        if plan is None:
            plan = self._plan = sampler.plan_for(sequences)
        num_rows = self._padded(len(sequences))
        self._rows.send_decoding(plan, num_rows, is_steady=is_steady, drawn_by=self._drawn_by)
        hidden = self._run_rows(num_rows, on_layer)
        return self._draw_uploaded(plan, sequences, hidden)

    def _draw_uploaded(
        self, plan: SamplingPlan, sequences: SequenceOf[Sequence], hidden: torch.Tensor
    ) -> LaunchedStep:
        """Draw for these, which have the first rows."""
        sampler = self._drawing()
        logprobs = None
        if plan.needs_logits:
            logits = self._decoder.logits(hidden)[: len(sequences)]
            logprobs = self._draw_changed(plan, sequences, logits)
        else:
            self._draw_rows(hidden, only_best=plan.only_best)
        self._drawn_by = sequences
        draws = sampler.send(len(sequences), plan, logprobs)
        return LaunchedStep(sequences, draws, draws.event)

    def _padded(self, num_seqs: int) -> int:
        if self._graphs is None or num_seqs > self._graphs.max_rows:
            return num_seqs
        return self._graphs.padded(num_seqs)

    def _run_rows(self, num_rows: int, on_layer: Callable[[int], None] | None) -> torch.Tensor:
        """The hidden states of the uploaded rows."""
        graphs = self._graphs
        if graphs is None or on_layer is not None or num_rows > graphs.max_rows:
            return self._forward_rows(num_rows, on_layer)
        return graphs.replay(num_rows)

    def _draw_rows(self, hidden: torch.Tensor, *, only_best: bool) -> None:
        """Draw from what `_run_rows` gave."""
        graphs, num_rows = self._graphs, len(hidden)
        if graphs is None or graphs.hidden(num_rows) is not hidden:
            self._draw(hidden, only_best)
        else:
            graphs.replay_draw(num_rows, only_best=only_best)

    def _forward_rows(
        self, num_rows: int, on_layer: Callable[[int], None] | None = None
    ) -> torch.Tensor:
        rows, tables = self._inputs.device_rows, self._inputs.tables[:num_rows]
        inputs = self._decode_inputs.first(num_rows)
        fill_decode_inputs(
            rows.ends[:num_rows],
            rows.tokens[:num_rows],
            rows.sources[:num_rows],
            self._none_drawn if self._sampler is None else self._sampler.drawn,
            tables,
            self._block_size,
            inputs,
        )
        batch = Batch(
            *inputs[:3],
            samples=None,
            seq_lens=inputs.seq_lens,
            cu_seqlens_q=self._no_seqlens[: num_rows + 1],
            block_tables=tables,
            num_samples=num_rows,
            max_seqlen_q=1,
            is_decode=True,
        )
        hidden = self._decoder.forward(batch, self._kv_layers, on_layer)
        if hidden is None:
            raise RuntimeError("A decode batch samples all its rows.")
        return hidden

    def _draw(self, hidden: torch.Tensor, only_best: bool) -> None:
        logits = self._decoder.logits(hidden)
        if self._sampler is not None:
            params = self._inputs.device_rows.draw_params(len(hidden))
            self._sampler.draw(logits, params, only_best=only_best)

    # ---- prefill ---------------------------------------------------------------------------

    def _launch_prefill(
        self, chunks: SequenceOf[ScheduledChunk], on_layer: Callable[[int], None] | None
    ) -> LaunchedStep:
        sampled = [chunk.sequence for chunk in chunks if chunk.samples]
        prompt_rows = None if on_layer is not None else self._prompt_rows(chunks)
        if prompt_rows is not None:
            return self._launch_prompt_rows(sampled, prompt_rows)
        batch = self._batches.build_prefill(chunks)
        hidden = self._decoder.forward(batch, self._kv_layers, on_layer)
        done = None
        if self._limits.on_gpu:
            done = torch.Event(self._limits.device)
            done.record()
        if hidden is None:
            self._drawn_by = ()  # who drew before may have lost their blocks since
            return LaunchedStep((), None, done)
        sampler = self._drawing()
        plan = sampler.plan_for(sampled)
        rows = self._inputs.next_rows()
        rows.set_params(plan)
        rows.ends[: len(sampled)] = [len(each.token_ids) for each in sampled]
        rows.sources[: len(sampled)] = -1
        self._inputs.upload()
        logits = self._decoder.logits(hidden)
        logprobs = None
        if plan.needs_logits:
            logprobs = self._draw_changed(plan, sampled, logits)
        else:
            params = self._inputs.device_rows.draw_params(len(sampled))
            sampler.draw(logits, params, only_best=plan.only_best)
        self._drawn_by = sampled
        return LaunchedStep(sampled, sampler.send(len(sampled), plan, logprobs), done)

    def _prompt_rows(self, chunks: SequenceOf[ScheduledChunk]) -> list[PromptRow] | None:
        return rows_of(chunks, max_rows=self.max_prompt_rows, max_read_tokens=self._max_read_tokens)

    def _launch_prompt_rows(
        self, sampled: SequenceOf[Sequence], prompt_rows: SequenceOf[PromptRow]
    ) -> LaunchedStep:
        """`sampled`: of the first rows."""
        plan = self._drawing().plan_for(sampled)
        num_rows = self._padded(len(prompt_rows))
        self._rows.send_prompts(plan, num_rows, prompt_rows)
        return self._draw_uploaded(plan, sampled, self._run_rows(num_rows, None))

    def _draw_changed(
        self, plan: SamplingPlan, sequences: SequenceOf[Sequence], logits: torch.Tensor
    ) -> torch.Tensor | None:
        """Draw the uploaded rows from logits that the plan changes; log-probabilities wanted."""
        rows, num_rows = self._inputs.device_rows, len(sequences)
        params, sources = rows.draw_params(num_rows), rows.sources[:num_rows]
        return self._drawing().draw_changed(plan, sequences, params, logits, sources)

    def _drawing(self) -> Sampler:
        if self._sampler is None:
            raise RuntimeError("Only rank 0 launches steps.")
        return self._sampler
