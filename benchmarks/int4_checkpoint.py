"""A checkpoint in AWQ's layout, rounded to four bits here: what `quantization` compares."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from engine.quantized_tensors import to_int4

if TYPE_CHECKING:
    from pathlib import Path

GROUP_SIZE = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def write_int4(source: Path, target: Path) -> None:
    """The checkpoint with its matrices rounded to 4 bits, in AWQ's layout."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module, _, kind = name.rpartition(".")
        if not (module.endswith("_proj") and kind == "weight"):
            stored[name] = tensor
            continue
        int4 = to_int4(tensor, GROUP_SIZE)
        stored[f"{module}.qweight"] = _words(int4.codes)
        stored[f"{module}.qzeros"] = _words(int4.zeros)
        stored[f"{module}.scales"] = int4.scales.t().to(torch.float16).contiguous()
    facts = json.loads((source / "config.json").read_text())
    facts["quantization_config"] = {
        "quant_method": "awq", "bits": 4, "group_size": GROUP_SIZE, "version": "gemm",
        "zero_point": True,
    }  # fmt: skip
    save_file(stored, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(facts))


def _words(codes: torch.Tensor) -> torch.Tensor:
    """`[out, n]` of 0 to 15 -> int32 `[n, out / 8]`."""
    columns = codes.t().long()
    words = sum(columns[:, output::8] << (4 * place) for place, output in enumerate(_AWQ_ORDER))
    return torch.as_tensor(words).to(torch.int32).contiguous()
