"""All rows of the bug catalogue."""

from __future__ import annotations

from tests.mutations.cluster_rows import CLUSTER_ROWS
from tests.mutations.device_rows import DEVICE_ROWS
from tests.mutations.failure_rows import FAILURE_ROWS
from tests.mutations.peer_rows import PEER_ROWS
from tests.mutations.tier_rows import TIER_ROWS
from tests.mutations.transfer_rows import TRANSFER_ROWS

ROWS = (*TRANSFER_ROWS, *PEER_ROWS, *FAILURE_ROWS, *CLUSTER_ROWS, *TIER_ROWS, *DEVICE_ROWS)
