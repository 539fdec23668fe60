"""What the clients of a soak ask for, and what each of it gets when nothing disturbs it."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tests.faults.asks import DEADLINE_SECONDS, FIRST_TOKEN, VOCABULARY, Ask, draw_prompt
from tests.faults.client import load
from tests.faults.history import Answer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.faults.cluster import FaultCluster

NUM_TEMPLATES = 48
NUM_STOP_IDS = 128
AT_ONCE = 8
STOPS = ("\n", ",", " the", "e ")
HURRIED_SECONDS = (0.05, 3.0)  # the deadline of who has little time
# Each may ask for one of these: what draws depend on besides the prompt, and who comes first.
MORE: tuple[tuple[str, Any], ...] = (
    ("frequency_penalty", 0.7),
    ("presence_penalty", 0.6),
    ("repetition_penalty", 1.2),
    ("top_k", 20),
    ("min_p", 0.05),
    ("logit_bias", {"300": 4.0}),
    ("logprobs", 2),
    ("priority", 1),
    ("priority", -1),
)
Oracle = dict[int, Answer]


def draw_templates(seed: int, longest: int) -> list[Ask]:
    """Kinds of requests of three tenants: some begin alike, some are sampled, some are not
    streamed. Prompts have up to `longest` tokens."""
    draw = random.Random(seed)
    longest_stem = longest * 3 // 5
    stems = [draw_prompt(draw, longest_stem // 3, longest_stem) for _ in range(4)]
    templates = []
    for number in range(NUM_TEMPLATES):
        stem = draw.choice(stems)[: draw.randrange(0, longest_stem)] if draw.random() < 0.5 else ()
        is_sampled = draw.random() < 0.25
        templates.append(
            Ask(
                number=number,
                prompt=stem + draw_prompt(draw, 1, longest - longest_stem),
                num_tokens=draw.choice((1, 2, 16, 48, 96)),
                is_stream=draw.random() < 0.8,
                temperature=0.8 if is_sampled else 0.0,
                top_p=0.9 if is_sampled else 1.0,
                seed=number if is_sampled else None,
                cache_salt=f"tenant-{number % 3}",
                more=(draw.choice(MORE),) if draw.random() < 0.5 else (),
            )
        )
    return [_stopping(draw, _with_choices(draw, ask)) for ask in templates]


def _with_choices(draw: random.Random, ask: Ask) -> Ask:
    """A third of the answers that are not streamed has several."""
    if ask.is_stream or draw.random() > 0.33:
        return ask
    return replace(ask, more=(*ask.more, ("n", draw.choice((2, 4)))))


def _stopping(draw: random.Random, ask: Ask) -> Ask:
    """One in four may end before it has all of its tokens."""
    if draw.random() < 0.75:
        return ask
    if draw.random() < 0.5:
        return replace(ask, stop=draw.choice(STOPS))
    ids = draw.sample(range(FIRST_TOKEN, VOCABULARY), NUM_STOP_IDS)
    at_least = (("min_tokens", ask.num_tokens // 2),) if draw.random() < 0.5 else ()
    return replace(ask, stop_token_ids=tuple(ids), more=ask.more + at_least)


def repeated(seed: int, templates: Sequence[Ask], ends_at: float) -> Iterator[Ask]:
    """These requests in random order until then; one of ten clients leaves early, one of twenty
    has a deadline that it may not meet."""
    draw = random.Random(seed + 1)
    round_number = 0
    while True:
        round_number += 1
        for template in draw.sample(list(templates), len(templates)):
            if time.monotonic() > ends_at:
                return
            leaves = template.is_stream and draw.random() < 0.1
            is_hurried = draw.random() < 0.05
            yield replace(
                template,
                number=template.number + NUM_TEMPLATES * round_number,
                leaves_after=draw.randrange(template.num_tokens) if leaves else None,
                leaves_by_reset=draw.random() < 0.5,
                deadline_seconds=draw.uniform(*HURRIED_SECONDS) if is_hurried else DEADLINE_SECONDS,
            )


def steady(cluster: FaultCluster, templates: Sequence[Ask]) -> tuple[list[Ask], Oracle]:
    """Those whose tokens are the same alone and among others, with cached prefixes and without,
    and their answers. A sum of floats in another order may tip a close choice: where it does
    undisturbed, nothing could be said of it disturbed."""
    first = answers(cluster, templates)
    again = [answers(cluster, templates)]
    cluster.admin("prefix-cache:reset", "POST")
    again += [answers(cluster, templates, at_once=1), answers(cluster, templates)]
    kept = [
        ask
        for ask in templates
        if {each[ask.number].token_ids for each in again} == {first[ask.number].token_ids}
    ]
    if any(each[ask.number] != first[ask.number] for ask in kept for each in again):
        raise RuntimeError("the same tokens were counted otherwise, or ended for another reason")
    return kept, {ask.number: first[ask.number] for ask in kept}


def answers(cluster: FaultCluster, templates: Sequence[Ask], *, at_once: int = AT_ONCE) -> Oracle:
    """Of each request, asked in peace. Raises `RuntimeError` when one fails."""
    with load(cluster.url_of, templates, at_once=at_once) as history:
        pass
    if history.erred():
        raise RuntimeError(f"requests failed although nothing was disturbed: {history.codes()}")
    return {ask.number: history.answer_of(ask.number) for ask in templates}
