"""The engine on a GPU: graphs, sizes and types that a CPU does not have."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cluster.errors import OutOfMemory
from cluster.prefix_hash import root_hash
from cluster.request import SamplingParams, SequenceRequest
from cluster.startup import StartupReport
from engine.config import EngineConfig
from engine.schedule import ScheduledChunk, ScheduleDecision
from engine.sequence import Sequence
from tests.engine.test_rehearsal import check_rehearsals

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from engine.engine import Engine
    from tests.engine.conftest import Expected, OpenEngine, RunGreedy

pytestmark = pytest.mark.gpu

POOL_BYTES = 512 << 20
# One layer's sizes are those of Llama-3.1-8B; two layers and a small vocabulary keep it quick.
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 8192,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shape")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return folder


@pytest.fixture(scope="module")
def open_dummy(folder: Path) -> Callable[..., Engine]:
    from engine.engine import Engine

    def open_dummy(**options: Any) -> Engine:
        settings: dict[str, Any] = {
            "model": folder,
            "device": "cuda",
            "load_format": "dummy",
            "kv_cache_memory_bytes": POOL_BYTES,
            "max_num_seqs": 20,
            "max_num_batched_tokens": 2048,
            "enable_prefix_caching": False,
        }
        config = EngineConfig(**settings | options)
        return Engine.create(config, progress=StartupReport(sink=lambda fact: None))

    return open_dummy


def start(engine: Engine, name: str, prompt: list[int]) -> Sequence:
    sequence = Sequence(
        SequenceRequest(
            sequence_id=name,
            request_id=name,
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(
                max_tokens=1000, seed=0, temperature=0.0, ignore_eos=True, num_logprobs=1
            ),
        ),
        block_size=engine.config.block_size,
        root=root_hash("test", b""),
    )
    assert engine.block_manager.allocate(sequence, len(prompt))
    return sequence


def step(engine: Engine, *chunks: tuple[Sequence, int]) -> list[float]:
    """Log-probabilities of the drawn tokens."""
    for sequence, length in chunks:
        assert engine.block_manager.allocate(sequence, sequence.num_computed_tokens + length)
    decision = ScheduleDecision(tuple(ScheduledChunk(*chunk) for chunk in chunks))
    return [delta.logprobs[0].logprob for delta in engine.step(decision).deltas]


def prompt_of(length: int, seed: int) -> list[int]:
    return [(17 * seed + 31 * index * index + 7 * index) % 8000 for index in range(length)]


def decode_log(engine: Engine, num_seqs: int, num_steps: int) -> list[list[float]]:
    """Prefill prompts of different lengths, then decode them together; logprobs per step.

    Tokens are forced to be the same whatever is drawn, so that two runs stay comparable.
    """
    sequences = [start(engine, f"s{i}", prompt_of(5 + 37 * i, i)) for i in range(num_seqs)]
    for sequence in sequences:
        step(engine, (sequence, sequence.num_prompt_tokens))
    log = []
    for index in range(num_steps):
        for row, sequence in enumerate(sequences):
            sequence.token_ids[-1] = (101 * index + row) % 8000
        log.append(step(engine, *((sequence, 1) for sequence in sequences)))
    for sequence in sequences:
        engine.block_manager.free(sequence)
    engine.block_manager.check_integrity()
    return log


@pytest.fixture(scope="module")
def graphs(open_dummy: Callable[..., Engine]) -> Engine:
    return open_dummy()


def close(first: list[list[float]], second: list[list[float]], tolerance: float) -> None:
    for ours, theirs in zip(first, second, strict=True):
        assert ours == pytest.approx(theirs, abs=tolerance)


@pytest.mark.parametrize("num_seqs", [1, 2, 3, 8, 9, 17, 20])
def test_a_graph_computes_what_single_kernels_compute(
    open_dummy: OpenEngine, graphs: Engine, num_seqs: int
) -> None:
    eager = open_dummy(enforce_eager=True)
    close(decode_log(graphs, num_seqs, 20), decode_log(eager, num_seqs, 20), 0.05)


def test_a_rehearsed_launch_leaves_the_steps_around_it_alone(
    graphs: Engine, run_greedy: RunGreedy
) -> None:
    check_rehearsals(graphs, run_greedy)


def test_padding_rows_do_not_touch_the_pool(graphs: Engine) -> None:
    """Three sequences run in a graph of four rows: the fourth writes nowhere."""
    tensor = graphs.kv_cache.tensor
    tensor.zero_()
    sequences = [start(graphs, f"s{i}", prompt_of(20, i)) for i in range(3)]
    for sequence in sequences:
        step(graphs, (sequence, 20))
    step(graphs, *((sequence, 1) for sequence in sequences))
    used = {block for sequence in sequences for block in sequence.block_table}
    written = tensor.abs().amax(dim=(0, 2, 3, 4, 5)).nonzero().flatten().tolist()
    assert set(written) == used
    for sequence in sequences:
        graphs.block_manager.free(sequence)


def test_a_step_without_memory_writes_to_its_blocks_no_more_once_that_is_told(
    graphs: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are given to hand-offs then, whose KV comes on other streams."""

    def fails(hidden: torch.Tensor) -> torch.Tensor:
        torch.cuda._sleep(1 << 30)  # type: ignore[no-untyped-call]
        return torch.empty(1 << 50, device="cuda")

    sequence = start(graphs, "s", prompt_of(20, 1))
    monkeypatch.setattr(graphs._runner._decoder, "logits", fails)
    with pytest.raises(OutOfMemory):
        step(graphs, (sequence, 20))
    assert torch.cuda.current_stream().query()
    graphs.block_manager.free(sequence)


def test_decode_gives_the_logprobs_of_a_prefill(graphs: Engine) -> None:
    """Each decoded token's probability equals that of computing all tokens in one chunk."""
    sequence = start(graphs, "decoded", prompt_of(100, 1))
    decoded = step(graphs, (sequence, 100))
    for _ in range(40):
        decoded += step(graphs, (sequence, 1))
    for index in (1, 15, 16, 17, 40):
        tokens = sequence.token_ids[: 100 + index]
        again = start(graphs, f"again{index}", tokens)
        (logprob,) = step(graphs, (again, len(tokens)))
        assert logprob == pytest.approx(decoded[index], abs=0.05)
        graphs.block_manager.free(again)
    graphs.block_manager.free(sequence)


def test_chunks_of_any_size_give_the_same_logprob(graphs: Engine) -> None:
    prompt = prompt_of(2000, 3)
    found = []
    for chunk in (2000, 512, 300, 129):
        sequence = start(graphs, f"chunk{chunk}", prompt)
        while sequence.num_output_tokens == 0:
            logprobs = step(graphs, (sequence, min(chunk, sequence.num_uncomputed_tokens)))
        found += logprobs
        graphs.block_manager.free(sequence)
    assert found == pytest.approx([found[0]] * 4, abs=0.05)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_types_work_too(open_dummy: OpenEngine, dtype: str) -> None:
    half = open_dummy(dtype=dtype)
    eager = open_dummy(dtype=dtype, enforce_eager=True)
    close(decode_log(half, 5, 5), decode_log(eager, 5, 5), 0.02)


AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}


@pytest.mark.parametrize(
    "options",
    [
        {"quantization": "fp8"},
        {"kv_cache_dtype": "fp8"},
        {"quantization": "fp8", "kv_cache_dtype": "fp8"},
        {"quantization": "awq"},
    ],
    ids=["fp8 weights", "fp8 KV", "both", "awq"],
)
def test_graphs_of_quantised_models_give_what_kernels_one_by_one_do(
    options: dict[str, str], open_dummy: OpenEngine, folder: Path, tmp_path: Path
) -> None:
    if options.get("quantization") == "awq":
        (tmp_path / "config.json").write_text(json.dumps(SHAPE | AWQ))
        folder = tmp_path
    captured = open_dummy(model=folder, **options)
    eager = open_dummy(model=folder, enforce_eager=True, **options)
    log = decode_log(captured, 5, 5)
    # What rounds to the other side of a step of 8 bits counts for more than in 16.
    close(log, decode_log(eager, 5, 5), 0.2)
    assert log != decode_log(open_dummy(), 5, 5)


@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3"])
def test_float8_kv_gives_the_tokens_that_it_gives_on_a_cpu(
    family: str, expected: Expected, open_engine: OpenEngine, run_greedy: RunGreedy
) -> None:
    """All but a few: a key that rounds to the other side of a step may turn a close choice."""
    prompts = [case["prompt"] for case in expected[family]]
    outputs = []
    for options in ({"device": "cpu"}, {"device": "cuda", "kv_cache_memory_bytes": POOL_BYTES}):
        engine = open_engine(family, kv_cache_dtype="fp8", **options)
        sequences = run_greedy(engine, prompts, chunk=512, num_tokens=24)
        outputs.append([sequence.output_token_ids for sequence in sequences])
    same = sum(one == other for one, other in zip(*outputs, strict=True))
    assert same >= len(prompts) * 3 // 4


def test_the_engine_stays_within_its_share_of_the_gpu(open_dummy: OpenEngine) -> None:
    import torch

    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    share = 0.2
    engine = open_dummy(kv_cache_memory_bytes=None, gpu_memory_utilization=share)
    decode_log(engine, 20, 2)
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated(device) - before
    total = torch.cuda.mem_get_info(device)[1]
    assert 0.5 * share * total < taken < share * total


def test_what_does_not_fit_is_refused_with_the_arithmetic(open_dummy: OpenEngine) -> None:
    from cluster.errors import ConfigError

    with pytest.raises(ConfigError, match=r"Weights .* \+ workspace .* raise --gpu-memory"):
        open_dummy(kv_cache_memory_bytes=None, gpu_memory_utilization=0.01)


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2", "qwen3"])
def test_greedy_tokens_in_float32_equal_the_reference(
    family: str, expected: Expected, open_engine: OpenEngine, run_greedy: RunGreedy
) -> None:
    cases = expected[family]
    engine = open_engine(family, device="cuda", kv_cache_memory_bytes=POOL_BYTES)
    sequences = run_greedy(engine, [case["prompt"] for case in cases], chunk=512, num_tokens=24)
    outputs = [sequence.output_token_ids for sequence in sequences]
    assert outputs == [case["tokens"] for case in cases]


def test_done_is_recorded_when_the_kv_of_a_step_is_written(graphs: Engine) -> None:
    sequence = start(graphs, "done", prompt_of(64, 2))
    output = graphs.step(ScheduleDecision((ScheduledChunk(sequence, 32),)))
    assert output.done is not None
    output.done.synchronize()
    block = graphs.kv_cache.tensor[:, sequence.block_table[1]]
    assert bool((block.abs().amax(dim=(1, 2, 3, 4)) > 0).all())
    graphs.block_manager.free(sequence)


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_layers_in_main_memory_give_the_same_tokens(
    enforce_eager: bool, tmp_path: Path, run_greedy: RunGreedy
) -> None:
    """Small products over large weights: a copy that were late, or early, would be seen."""
    from engine.engine import Engine

    (tmp_path / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": 12}))
    prompts = [[7 * seed + index for index in range(40)] for seed in range(4)]
    outputs = []
    for gib in (0.0, 2.0):
        config = EngineConfig(
            model=tmp_path,
            device="cuda",
            load_format="dummy",
            kv_cache_memory_bytes=POOL_BYTES,
            max_num_seqs=4,
            max_num_batched_tokens=256,
            cpu_offload_gb=gib,
            enforce_eager=enforce_eager,
        )
        engine = Engine.create(config, progress=StartupReport(sink=lambda fact: None))
        sequences = run_greedy(engine, prompts, chunk=64, num_tokens=24)
        outputs.append([sequence.output_token_ids for sequence in sequences])
        del engine
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("lengths", [(1,), (5,), (700,), (64, 64, 64), (3, 50, 333), (2048,)])
def test_no_step_after_the_start_compiles_a_kernel(
    lengths: tuple[int, ...], open_dummy: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    engine = open_dummy()
    compiled: list[str] = []

    def note(**facts: Any) -> bool:
        compiled.append(str(facts["repr"]))
        return False

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    sequences = [start(engine, f"s{i}", prompt_of(n, i)) for i, n in enumerate(lengths)]
    step(engine, *zip(sequences, lengths, strict=True))
    engine.rehearse()
    step(engine, *((sequence, 1) for sequence in sequences))
    assert compiled == []
    for sequence in sequences:
        engine.block_manager.free(sequence)
