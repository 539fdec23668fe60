"""The process of a rank other than 0: `python -m engine.tensor_parallel.worker CHANNEL LIFELINE`.

Life of a worker
    1. It hears its rank, the options of the engine and where to meet the others.
    2. It builds the engine exactly as rank 0 does, with its shard of the weights and its heads of
       the KV pool. What it cannot do it says, and rank 0 raises that.
    3. It runs each batch that rank 0 announces. It decides nothing: no scheduler, no sampling.
    4. It ends when its channel ends. A thread watches the lifeline, so that it also ends, at
       once, when rank 0 dies while a kernel or a socket keeps the main thread waiting.

Started by `crew.py`; not for people.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import threading
from typing import TYPE_CHECKING

import torch

from cluster.config import load_config
from cluster.errors import ConfigError
from cluster.startup import StartupReport
from engine.config import EngineConfig
from engine.engine import Engine
from engine.tensor_parallel.failures import RankLost
from engine.tensor_parallel.rendezvous import OtherRank
from engine.tensor_parallel.seat import Seat
from engine.tensor_parallel.shard import Shard
from engine.tensor_parallel.wire import Channel, Closed, FrameKind

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_ORPHAN = 1
EXIT_LOST = 1


def main(argv: Sequence[str]) -> int:
    channel = Channel(socket.socket(fileno=int(argv[0])))
    threading.Thread(target=_end_with_rank_0, args=(int(argv[1]),), daemon=True).start()
    try:
        return run(channel)
    except (Closed, RankLost):
        return EXIT_LOST  # rank 0 knows, or is gone


def run(channel: Channel) -> int:
    """The exit code of a worker that could not start; else it does not return."""
    orders = channel.receive_note()
    rendezvous = OtherRank(channel)
    seat = Seat(Shard(orders["rank"], orders["size"]), rendezvous, [channel], orders["folder"])
    try:
        loaded = load_config("rank", (EngineConfig,), [], orders["options"])
        engine = Engine.create(
            loaded[EngineConfig], progress=StartupReport(sink=lambda fact: None), seat=seat
        )
    except ConfigError as error:
        rendezvous.refuse(error.message)
        return ConfigError.exit_code
    serve(engine, channel)
    # Nothing is left to do, and what libraries do at the end of a process would wait for rank 0.
    sys.stdout.flush()
    os._exit(0)


def serve(engine: Engine, channel: Channel) -> None:
    """Run what is announced until the channel ends."""
    gc.collect()
    gc.freeze()  # as rank 0: a collection that looked at it all would hold up a step
    with torch.inference_mode():
        while True:
            try:
                kind, _ = channel.receive_head()
            except Closed:
                return
            if kind is not FrameKind.STEP:
                raise ValueError("only steps are announced while serving")
            engine.follow(channel.receive_step_header(), channel.receive_into)


def _end_with_rank_0(lifeline: int) -> None:
    """The pipe has one writer, rank 0; nothing is ever written."""
    os.read(lifeline, 1)
    os._exit(EXIT_ORPHAN)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
