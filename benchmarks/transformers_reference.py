"""The same generation by `transformers`, as a process that answers one job per line.

It is run with `python -S -P` and only the installed packages on its path: `transformers` probes
for a package named `kernels`, and ours must not be what it finds.

    stdin    {"prompts": [[token ids], ...], "num_tokens": n}
    stdout   {"seconds": s, "num_tokens": all that were generated}

The first line of stdout tells the versions, before any job. All prompts of a job form one
batch, decoded greedily, exactly `num_tokens` each.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from typing import Any

import torch
import transformers


def main(folder: str, dtype: str) -> None:
    if importlib.util.find_spec("kernels") is not None:
        sys.exit("A package named kernels is importable; the reference would not be the reference.")
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    weights_dtype = getattr(torch, dtype)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=weights_dtype)
    model.eval()
    tell(
        {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "dtype": dtype,
            "num_threads": torch.get_num_threads(),
        }
    )
    for line in sys.stdin:
        tell(generate(model, **json.loads(line)))


@torch.inference_mode()
def generate(model: Any, prompts: list[list[int]], num_tokens: int) -> dict[str, float]:
    input_ids = torch.tensor(prompts)
    began = time.perf_counter()
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        use_cache=True,
    )
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "num_tokens": (output.shape[1] - input_ids.shape[1]) * len(prompts)}


def tell(document: dict[str, Any]) -> None:
    print(json.dumps(document), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
