"""How many compiled matrix products a CPU keeps.

oneDNN compiles a product for each number of rows, and keeps 1024 of them; ideep, between torch and
it, keeps as many notes of its own. A prompt may have any number of rows, so a node grew with each
length that it saw: by 720 MiB over 600 prompts of up to 500 tokens, of the model that comes with
Baton. With 256 it is 290 MiB and no slower: five products for each of fifty numbers of rows, more
than batches of decoding sequences change between.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import MutableMapping

MAX_KEPT = 256
_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def bound_kept_products(environ: MutableMapping[str, str] = os.environ) -> None:
    """Before the first product, as both read their variables then. What is set there stays."""
    for name in _VARIABLES:
        environ.setdefault(name, str(MAX_KEPT))
