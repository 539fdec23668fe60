"""One model, one paged cache, one step.

Life of an engine
    1. `Engine.create` reads the checkpoint's facts, decides what the configuration left open,
       loads the weights, measures what a full step needs, gives the rest to the KV pool, and
       on a GPU captures the decode graphs. Whatever cannot work is a `ConfigError` here.
    2. `launch(decision)` queues the chunks that a scheduler decided on: inputs, forward pass,
       draws of the next tokens, their copy to the host. It waits for nothing.
    3. `collect(step)` waits for the tokens, advances the sequences and says which ended. The
       scheduler frees their blocks. `step` does both at once.

Two steps may be in flight; `step_pipeline.py` says how, and why that is safe.

The engine knows no role and no network, and belongs to one thread at a time.
"""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch

from engine import memory, warm_up
from engine.block_manager import BlockManager
from engine.host_copier import HostCopier
from engine.kept_products import bound_kept_products
from engine.kv_allocation import allocate_kv, layout_of
from engine.limits import EngineLimits, Machine, resolve
from engine.model_runner import ModelRunner
from engine.models.loading import load_decoder, read_model
from engine.out_of_memory import run_within_memory
from engine.rehearsal import LaunchRehearsal
from engine.restores import Restores
from engine.sampler import Sampler
from engine.step_pipeline import StepOutput, StepPipeline
from engine.tensor_parallel.crew import Crew
from engine.tensor_parallel.shard import WHOLE, Shard

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from contextlib import AbstractContextManager

    from cluster.startup import StartupReport
    from engine.config import EngineConfig
    from engine.kv_cache import KVCache, KVLayout
    from engine.models.config import ModelConfig
    from engine.schedule import ScheduleDecision
    from engine.step_pipeline import InFlightStep
    from engine.tensor_parallel.ranks import Ranks
    from engine.tensor_parallel.seat import Seat
    from engine.tensor_parallel.wire import StepHeader

logger = logging.getLogger(__name__)


class Engine:
    """`block_manager` and `kv_cache` are for the thread that steps; the facts are for all."""

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        limits: EngineLimits,
        runner: ModelRunner,
        kv_cache: KVCache,
        weights_fingerprint: str,
        kv_layout: KVLayout | None = None,
        kv_shards: tuple[torch.Tensor, ...] = (),
        crew: Crew | None = None,
    ) -> None:
        """`kv_layout`, `kv_shards`, `crew`: of a model that several ranks share."""
        self.config = config
        self.model_config = model_config
        self.limits = limits
        self.kv_cache = kv_cache
        self.kv_layout = kv_layout or kv_cache.layout
        self._kv_shards = kv_shards
        self._crew = crew
        self.weights_fingerprint = weights_fingerprint
        self.eos_token_ids = frozenset(model_config.eos_token_ids)
        owns_blocks = config.tensor_parallel_size == 1 or crew is not None  # or a worker
        num_host_blocks = memory.num_host_blocks(config, self.kv_layout) if owns_blocks else 0
        self.block_manager = BlockManager(
            kv_cache.num_blocks,
            config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
            num_host_blocks=num_host_blocks,
            num_ahead=2 * limits.max_model_len // config.block_size,
            num_at_once=2 * limits.max_num_batched_tokens // config.block_size,
        )
        self.copier = HostCopier(self.kv_pools, num_host_blocks) if num_host_blocks else None
        self.restores = Restores(self.block_manager, self.copier)
        self._runner = runner
        self._pipeline = StepPipeline(
            runner, self.block_manager, self.eos_token_ids, limits.max_model_len
        )
        self.overlaps = limits.on_gpu
        self._rehearsal: LaunchRehearsal | None = None
        self._thread: int | None = None

    @property
    def overlaps(self) -> bool:
        """Whether a step may be launched behind one in flight. Not on a CPU, by default: it is
        itself the device."""
        return self._pipeline.overlaps

    @overlaps.setter
    def overlaps(self, overlaps: bool) -> None:
        self._pipeline.overlaps = overlaps

    @property
    def max_model_len(self) -> int:
        return self.limits.max_model_len

    @property
    def max_num_seqs(self) -> int:
        return self.limits.max_num_seqs

    @property
    def max_num_batched_tokens(self) -> int:
        return self.limits.max_num_batched_tokens

    @property
    def kv_pools(self) -> tuple[torch.Tensor, ...]:
        """The KV pool of each rank as bytes, for moving blocks: uint8 `[num_layers, num_blocks,
        bytes]`, each with an equal part of the KV heads, in their order."""
        return self._kv_shards or (self.kv_cache.as_bytes(),)

    def start_copies(self, call: Callable[[Callable[[], None]], Future[None]]) -> None:
        """Start the copies to and from host memory that the block manager asks for. `call` gets,
        on any thread, what is to be run on the engine's when one has ended."""
        host = self.block_manager.host
        if self.copier is not None and host is not None:
            self.copier.start_wanted(host, call)

    def watch(self, on_lost: Callable[[BaseException], None]) -> None:
        """Call `on_lost`, from any thread, when a rank of this engine dies between steps, or its
        device is lost in a copy."""
        for part in (self._crew, self.copier):
            if part is not None:
                part.watch(on_lost)

    @property
    def worker_pids(self) -> list[int]:
        """Processes of the other ranks."""
        return [] if self._crew is None else self._crew.pids

    def close(self) -> None:
        """End the processes of the other ranks, and the copies under way. Idempotent."""
        if self.copier is not None:
            self.copier.close()
        if self._crew is not None:
            self._crew.close()

    @classmethod
    def create(
        cls, config: EngineConfig, *, progress: StartupReport, seat: Seat | None = None
    ) -> Engine:
        """Raises `ConfigError`, in one line, for whatever would keep it from serving.

        `seat`: of a worker, which builds the shard of its rank. Rank 0 starts the workers.
        """
        if config.tensor_parallel_size == 1 or seat is not None:
            return cls._build(config, progress, seat, None)
        model_config = read_model(config)
        Shard(0, config.tensor_parallel_size).fitted(model_config)
        limits = resolve(config, model_config, Machine.here())
        crew = Crew.start(config, on_gpu=limits.on_gpu)
        with ExitStack() as undo:
            undo.callback(crew.close)
            engine = cls._build(config, progress, crew.seat, crew)
            undo.pop_all()
        return engine

    @classmethod
    def _build(
        cls,
        config: EngineConfig,
        progress: StartupReport,
        seat: Seat | None,
        crew: Crew | None,
    ) -> Engine:
        whole = read_model(config)
        shard = WHOLE if seat is None else seat.shard.fitted(whole)
        limits = resolve(config, whole, Machine.here(), rank=shard.rank)
        if limits.attention_backend is not None:
            logger.info("attention to prompts by %s", limits.attention_backend)
        _enter_thread(limits)
        if not limits.on_gpu:
            bound_kept_products()
        # Another engine of this process is not part of this one's share.
        others_bytes = torch.cuda.memory_reserved(limits.device) if limits.on_gpu else 0
        ranks = None if seat is None else _connect(seat, crew, whole, limits, progress)
        decoder, fingerprint = load_decoder(config, whole, limits, progress, ranks)
        torch.cuda.empty_cache()  # before what stays is put between what the loader has left
        layout = layout_of(whole, config, limits)
        sampler = _sampler_of(whole, limits) if shard.rank == 0 else None
        with progress.phase("allocate KV"):
            if seat is not None:
                seat.rendezvous.exchange({})  # all have loaded: what follows is done together
            kv_cache, kv_shards = allocate_kv(
                config, limits, layout, decoder, sampler, others_bytes, seat
            )
        announce = None if crew is None else crew.announce
        runner = ModelRunner(decoder, kv_cache, limits, sampler, announce)
        with torch.inference_mode():
            with progress.phase("warm up"):
                warm_up.warm_up(decoder, kv_cache.layers, limits)
            if limits.on_gpu and not config.enforce_eager:
                runner.capture_graphs(progress)
        return cls(config, whole, limits, runner, kv_cache, fingerprint, layout, kv_shards, crew)

    def follow(self, header: StepHeader, fill: Callable[[memoryview], None]) -> None:
        """On a worker: run the batch that rank 0 announced; `fill` writes its packed inputs."""
        self._runner.follow(header, fill)

    def step(
        self, decision: ScheduleDecision, *, on_layer: Callable[[int], None] | None = None
    ) -> StepOutput:
        """Compute the chunks, draw the tokens of those that end there, advance all of them."""
        return self.collect(self.launch(decision, on_layer=on_layer))

    def launch(
        self, decision: ScheduleDecision, *, on_layer: Callable[[int], None] | None = None
    ) -> InFlightStep:
        """Queue a step behind the one in flight, of which there may be one.

        `on_layer(i)` is called when the KV of layer i is written, before later layers are
        computed (GPU: queued on the current stream). Raises only what ends the whole step, and
        then nothing of it is in flight: `OutOfMemory` when the device had none left for it.
        """
        self._enter()
        with self._together():
            return run_within_memory(partial(self._pipeline.launch, decision, on_layer))

    def collect(self, step: InFlightStep) -> StepOutput:
        """Wait for the oldest step in flight and advance its sequences, but for those that have
        ended since it was launched. After an error no step is in flight."""
        with self._together():
            return run_within_memory(partial(self._pipeline.collect, step))

    def rehearse(self) -> None:
        """Play the launch of a first step; none may be in flight, and nothing comes of it."""
        self._enter()
        if self._rehearsal is None:
            vocab_size, block_size = self.model_config.vocab_size, self.config.block_size
            self._rehearsal = LaunchRehearsal(vocab_size, block_size, self.limits.device)
        self._rehearsal.play()

    def _enter(self) -> None:
        if self._thread != threading.get_ident():
            self._thread = threading.get_ident()
            _enter_thread(self.limits)

    def _together(self) -> AbstractContextManager[None]:
        """A step of several ranks is watched: one that is lost would leave it waiting."""
        return nullcontext() if self._crew is None else self._crew.stepping()


def _enter_thread(limits: EngineLimits) -> None:
    """Both settings are per thread: the device that launches go to, and OpenMP's team."""
    if limits.on_gpu:
        torch.cuda.set_device(limits.device)
    if limits.num_threads is not None:
        torch.set_num_threads(limits.num_threads)


def _connect(
    seat: Seat,
    crew: Crew | None,
    model: ModelConfig,
    limits: EngineLimits,
    progress: StartupReport,
) -> Ranks:
    """With the other ranks, which rank 0 watches from now on."""
    with progress.phase("connect ranks"):
        ranks = seat.connect(model, limits)
    if crew is not None:
        crew.connected(ranks)
    return ranks


def _sampler_of(model: ModelConfig, limits: EngineLimits) -> Sampler:
    return Sampler(
        model.vocab_size,
        limits.device,
        eos_token_ids=model.eos_token_ids,
        max_rows=limits.max_num_seqs,
    )
