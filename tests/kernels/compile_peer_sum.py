"""A process that compiles a meeting of two ranks for Hopper, and prints what it does to memory.

It needs no GPU: see `compile_gluon`. One word a line, in the order of the program: "fence", "send"
for a word written to the other rank, "poll" for a look at what it has sent.
"""

from __future__ import annotations

import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.peer_sum import _peer_sum_kernel

TYPES = {"x_ptr": "*i32", "inboxes_ptr": "*i64", "epochs_ptr": "*i32", "num_words": "i32"}
CONSTANTS = {
    "RANK": 0, "SIZE": 2, "CAPACITY": 8192, "REGION": 64, "BLOCK": 64, "CONTRIBUTES": True,
    "KIND": "fp32", "COMPILED": True, "CHAINED": True,
}  # fmt: skip
WORDS = {
    "fence": re.compile(r"fence\.acq_rel\.sys"),
    "send": re.compile(r"st\.global\.(v2\.)?b64"),
    "poll": re.compile(r"ld\.volatile\.global"),
}


def main(fences: bool) -> None:
    constants = CONSTANTS | {"FENCES": fences}
    names = _peer_sum_kernel.arg_names
    source = ASTSource(
        _peer_sum_kernel,
        {name: TYPES.get(name, "constexpr") for name in names},
        {(at,): constants[name] for at, name in enumerate(names) if name in constants},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
    for line in compiled.asm["ptx"].splitlines():
        for word, pattern in WORDS.items():
            if pattern.search(line):
                print(word)


if __name__ == "__main__":
    main(sys.argv[1] == "fences")
