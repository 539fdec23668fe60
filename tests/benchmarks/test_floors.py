"""Floors of the engine's figures: by bytes where memory binds, by product where arithmetic does."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from benchmarks.floors import Floors
from benchmarks.kernels.ceilings import Ceilings
from benchmarks.model_shapes import SHAPES
from engine.models.config import ModelConfig

if TYPE_CHECKING:
    from pathlib import Path

CEILINGS = Ceilings(copy=4e12, matmul=800e12)  # 400 FLOP in the time of a weight's two bytes
ROWS_IN_BALANCE = 200


def floors_of(folder: Path, shape: str, **facts: object) -> Floors:
    (folder / "config.json").write_text(json.dumps(SHAPES[shape] | facts))
    model = ModelConfig.from_folder(folder)
    return Floors(model, CEILINGS, dtype_bytes=2, kv_token_bytes=131072)


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_both_floors_agree_while_memory_binds_every_product(tmp_path: Path, shape: str) -> None:
    floors = floors_of(tmp_path, shape)
    for num_seqs in (1, ROWS_IN_BALANCE):
        by_bytes = floors.decode_by_bytes(num_seqs, 1000)
        # Norms have weights and no product.
        assert floors.decode_by_product(num_seqs, 1000) == pytest.approx(by_bytes, rel=1e-3)


def test_beyond_it_products_take_their_arithmetic_and_kv_its_bytes(tmp_path: Path) -> None:
    floors = floors_of(tmp_path, "llama-3.1-8b")
    weights = floors.decode_by_product(1, 0)
    assert weights is not None
    kv_seconds = 2 * ROWS_IN_BALANCE * 1000 * 131072 / CEILINGS.copy
    expected = pytest.approx(2 * weights + kv_seconds)
    assert floors.decode_by_product(2 * ROWS_IN_BALANCE, 1000) == expected


def test_products_of_fewer_bytes_are_bound_by_arithmetic_sooner(tmp_path: Path) -> None:
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    floors = floors_of(tmp_path, "llama-3.1-8b", quantization_config=awq)
    by_bytes = floors.decode_by_bytes(ROWS_IN_BALANCE, 0)
    by_product = floors.decode_by_product(ROWS_IN_BALANCE, 0)
    plain = floors_of(tmp_path, "llama-3.1-8b").decode_by_product(ROWS_IN_BALANCE, 0)
    assert by_bytes < 0.5 * (by_product or 0.0)
    assert by_product == pytest.approx(plain), "the same arithmetic"


def test_float8_has_no_floor_by_product(tmp_path: Path) -> None:
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    floors = floors_of(tmp_path, "llama-3.1-8b", quantization_config=fp8)
    assert floors.decode_by_product(32, 1000) is None
    assert floors.decode_by_bytes(32, 1000) > 0
