from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.membership import (
    MAX_RETIRED,
    MISSING_GRACE_SECONDS,
    OBSERVATION_SECONDS,
    RETIRED_SECONDS,
    ClusterView,
    Membership,
    NodeGone,
    ViewChanged,
)
from cluster.membership_events import (
    Event,
    Missing,
    RegistryLost,
    Seen,
    SessionLost,
    SessionOpened,
    StateObserved,
    StateTold,
    Tick,
    Withdrawn,
)
from cluster.node import Incarnation, NodeId, NodeInfo, NodeLoad, NodeName, NodeRole, NodeState
from tests.cluster.conftest import node_info

if TYPE_CHECKING:
    from collections.abc import Sequence

A = NodeName("a")


def seen(name: str = "a", incarnation: int = 1, **changes: object) -> Seen:
    return Seen(node_info(name, incarnation, **changes))  # type: ignore[arg-type]


def names(nodes: Sequence[NodeInfo]) -> list[str]:
    return [info.id.name for info in nodes]


def state_of(membership: Membership, name: NodeName = A) -> NodeState | None:
    info = membership.view.get(name)
    return None if info is None else info.state


def test_an_announced_node_enters_the_view() -> None:
    membership = Membership()
    (change,) = membership.handle(seen(), 0.0)
    assert change == ViewChanged(membership.view)
    assert names(membership.view.prefill) == ["a"]
    assert membership.view.decode == ()


def test_the_view_sorts_nodes_by_role_and_readiness() -> None:
    membership = Membership()
    decode = NodeRole.DECODE
    membership.handle_all(
        [
            seen("p1"),
            seen("p0"),
            seen("p2", state=NodeState.STARTING),
            seen("d0", 7, role=decode),
            seen("d1", role=decode),
            seen("d2", role=decode, state=NodeState.DRAINING),
        ],
        0.0,
    )
    view = membership.view
    assert names(view.prefill) == ["p0", "p1"]
    assert names(view.decode) == ["d0", "d1"]
    assert list(view.nodes) == ["d0", "d1", "d2", "p0", "p1", "p2"]
    assert view.incarnations == {"p0": 1, "p1": 1, "d0": 7, "d1": 1}
    assert view.find(NodeId(NodeName("d0"), Incarnation(7))) is view.get(NodeName("d0"))
    assert view.find(NodeId(NodeName("d0"), Incarnation(8))) is None


def test_a_heartbeat_that_changes_nothing_tells_nothing() -> None:
    membership = Membership()
    membership.handle(seen(), 0.0)
    assert membership.handle(seen(), 1.0) == []
    (change,) = membership.handle(seen(load=NodeLoad(num_running=2)), 2.0)
    assert isinstance(change, ViewChanged)
    assert change.view.prefill[0].load.num_running == 2


def test_a_view_cannot_be_changed() -> None:
    membership = Membership()
    membership.handle(seen(), 0.0)
    before = membership.view
    with pytest.raises(FrozenInstanceError):
        before.prefill = ()  # type: ignore[misc]
    with pytest.raises(TypeError):
        before.nodes[A] = before.prefill[0]  # type: ignore[index]
    membership.handle(seen("b"), 0.0)
    assert names(before.prefill) == ["a"]


def test_a_new_incarnation_replaces_the_old_at_once() -> None:
    membership = Membership()
    membership.handle(seen(incarnation=1), 0.0)
    gone, change = membership.handle(seen(incarnation=2), 0.0)
    assert gone == NodeGone(NodeId(A, Incarnation(1)), "replaced")
    assert isinstance(change, ViewChanged)
    assert change.view.incarnations == {"a": 2}


def test_late_messages_of_the_old_incarnation_are_ignored() -> None:
    membership = Membership()
    old = NodeId(A, Incarnation(1))
    membership.handle(seen(incarnation=1), 0.0)
    membership.handle(seen(incarnation=2), 0.0)
    late: list[Event] = [
        seen(incarnation=1),
        SessionLost(old),
        SessionOpened(old),
        StateObserved(old, NodeState.DRAINING),
        StateTold(old, NodeState.DRAINING),
        Withdrawn(old),
    ]
    for event in late:
        assert membership.handle(event, 1.0) == []
    assert membership.view.incarnations == {"a": 2}


def test_a_lost_session_takes_the_node_out_whatever_its_entry_says() -> None:
    membership = Membership()
    node = node_info().id
    membership.handle(seen(), 0.0)
    membership.handle(SessionLost(node), 1.0)
    assert state_of(membership) is NodeState.LOST
    assert membership.view.prefill == ()
    assert membership.handle(seen(load=NodeLoad()), 2.0) == []
    membership.handle(SessionOpened(node), 3.0)
    assert state_of(membership) is NodeState.READY


def test_a_new_incarnation_is_not_lost_because_the_old_one_was() -> None:
    membership = Membership()
    membership.handle(seen(), 0.0)
    membership.handle(SessionLost(node_info().id), 0.0)
    membership.handle(seen(incarnation=2), 0.0)
    assert state_of(membership) is NodeState.READY


def test_a_missing_node_is_gone_only_after_its_grace() -> None:
    membership = Membership()
    membership.handle(seen(), 0.0)
    membership.handle_all([Missing(A), Tick()], 1.0)
    assert membership.handle_all([Missing(A), Tick()], 1.0 + MISSING_GRACE_SECONDS - 0.1) == []
    gone, change = membership.handle_all([Missing(A), Tick()], 1.0 + MISSING_GRACE_SECONDS)
    assert gone == NodeGone(node_info().id, "expired")
    assert isinstance(change, ViewChanged)
    assert change.view.nodes == {}


def test_a_node_that_restores_its_entry_within_the_grace_stays() -> None:
    membership = Membership()
    membership.handle(seen(), 0.0)
    membership.handle_all([Missing(A), Tick()], 1.0)
    membership.handle_all([seen(), Tick()], 2.0)
    assert membership.handle_all([Tick()], 1.0 + MISSING_GRACE_SECONDS) == []
    assert membership.handle_all([Missing(A), Tick()], 2.0 + MISSING_GRACE_SECONDS) == []


def test_a_node_that_is_connected_outlives_its_entry_until_its_session_ends() -> None:
    membership = Membership()
    membership.handle(seen(), 0.0)
    membership.handle(SessionOpened(node_info().id), 0.0)
    membership.handle_all([Missing(A), Tick()], 1.0)
    assert membership.handle_all([Missing(A), Tick()], 2.0 + MISSING_GRACE_SECONDS) == []
    assert state_of(membership) is NodeState.READY
    later = 3.0 + MISSING_GRACE_SECONDS
    membership.handle(SessionLost(node_info().id), later)
    assert NodeGone(node_info().id, "expired") in membership.handle(Tick(), later)


def test_no_grace_runs_while_the_registry_does_not_answer() -> None:
    membership = Membership()
    membership.handle(seen(), 0.0)
    membership.handle_all([Missing(A), Tick()], 1.0)
    membership.handle(RegistryLost(), 2.0)
    assert membership.handle_all([Missing(A), Tick()], 100.0) == []
    assert names(membership.view.prefill) == ["a"]


def test_a_node_that_expired_may_come_back_as_the_same_incarnation() -> None:
    membership = Membership(missing_grace_seconds=1.0)
    membership.handle(seen(), 0.0)
    membership.handle(Missing(A), 0.0)
    membership.handle(Tick(), 1.0)
    assert state_of(membership) is None
    membership.handle(seen(), 2.0)
    assert state_of(membership) is NodeState.READY


def test_a_withdrawn_node_is_gone_at_once_and_its_lingering_entry_does_not_bring_it_back() -> None:
    membership = Membership()
    membership.handle(seen(), 0.0)
    gone, _ = membership.handle(Withdrawn(node_info().id), 0.0)
    assert gone == NodeGone(node_info().id, "withdrawn")
    assert membership.handle(seen(), 0.5) == []


def test_what_was_observed_stands_until_the_entry_catches_up() -> None:
    membership = Membership()
    membership.handle(seen(), 0.0)
    membership.handle(StateObserved(node_info().id, NodeState.CORDONED), 0.0)
    assert membership.view.prefill == ()
    membership.handle_all([seen(), Tick()], 0.5)
    assert state_of(membership) is NodeState.CORDONED
    membership.handle_all([seen(state=NodeState.CORDONED), Tick()], 1.0)
    membership.handle_all([seen(), Tick()], 1.5)
    assert state_of(membership) is NodeState.READY


def test_what_was_observed_does_not_outweigh_the_entry_for_ever() -> None:
    membership = Membership()
    membership.handle(seen(), 0.0)
    membership.handle(StateObserved(node_info().id, NodeState.CORDONED), 0.0)
    membership.handle_all([seen(), Tick()], OBSERVATION_SECONDS - 0.1)
    assert state_of(membership) is NodeState.CORDONED
    membership.handle_all([seen(), Tick()], OBSERVATION_SECONDS)
    assert state_of(membership) is NodeState.READY


def reached(*told: NodeState) -> Membership:
    """It has a session with the node, which has said these states on it."""
    membership = Membership()
    membership.handle_all([seen(), SessionOpened(node_info().id)], 0.0)
    membership.handle_all([StateTold(node_info().id, state) for state in told], 0.0)
    return membership


def test_a_node_that_says_that_it_drains_takes_nothing_more_whatever_its_entry_says() -> None:
    membership = reached(NodeState.DRAINING)
    assert membership.view.prefill == ()
    for now in (1.0, 10 * OBSERVATION_SECONDS):  # an entry that is read later is no later word
        membership.handle_all([seen(load=NodeLoad(num_running=1)), Tick()], now)
        assert state_of(membership) is NodeState.DRAINING


def test_the_entry_may_tell_of_a_drain_before_the_node_does() -> None:
    membership = reached()
    membership.handle(seen(state=NodeState.DRAINING), 1.0)
    assert state_of(membership) is NodeState.DRAINING
    assert membership.handle(StateTold(node_info().id, NodeState.DRAINING), 1.1) == []
    assert membership.handle(StateTold(node_info().id, NodeState.DRAINING), 1.2) == [], "said twice"


def test_an_uncordon_takes_effect_though_the_entry_still_tells_of_the_drain() -> None:
    membership = reached(NodeState.DRAINING)
    membership.handle(seen(state=NodeState.DRAINING), 1.0)
    membership.handle(StateTold(node_info().id, NodeState.READY), 1.1)
    assert names(membership.view.prefill) == ["a"]


def test_what_the_node_says_outweighs_what_it_answered_to_an_order() -> None:
    """The answer may be read after the word of a later order, by another gateway."""
    membership = reached(NodeState.DRAINING, NodeState.READY)
    membership.handle(StateObserved(node_info().id, NodeState.DRAINING), 0.1)
    assert state_of(membership) is NodeState.READY


def test_what_was_said_on_a_session_ends_with_it() -> None:
    node = node_info().id
    membership = reached(NodeState.DRAINING)
    membership.handle(SessionLost(node), 1.0)
    assert state_of(membership) is NodeState.LOST
    membership.handle(SessionOpened(node), 2.0)
    assert state_of(membership) is NodeState.READY, "as its entry says, until it says so itself"
    membership.handle(StateTold(node, NodeState.DRAINING), 2.1)
    assert state_of(membership) is NodeState.DRAINING


def test_a_new_incarnation_is_not_draining_because_the_old_one_was() -> None:
    membership = reached(NodeState.DRAINING)
    membership.handle(seen(incarnation=2), 1.0)
    assert state_of(membership) is NodeState.READY
    assert membership.handle(StateTold(node_info().id, NodeState.DRAINING), 1.1) == []


def test_an_old_entry_that_was_revived_for_a_moment_takes_nobodys_place_for_ever() -> None:
    """As after a fail-over of the registry, seen by a gateway that did not know the old one."""
    membership = Membership()
    membership.handle(seen(incarnation=2), 0.0)
    membership.handle(seen(incarnation=1), 1.0)
    assert membership.handle(seen(incarnation=2), 2.0) == []
    assert membership.handle(seen(incarnation=2), 1.0 + RETIRED_SECONDS) != []
    assert membership.view.incarnations == {"a": 2}
    assert membership.handle(seen(incarnation=1), 2.0 + RETIRED_SECONDS) == []


def test_memory_of_old_incarnations_is_bounded() -> None:
    membership = Membership()
    for incarnation in range(1, 3 * MAX_RETIRED):
        membership.handle(seen(incarnation=incarnation), 0.0)
    assert len(membership._retired) == MAX_RETIRED
    membership.check_integrity()


ids = st.builds(NodeId, st.sampled_from([A, NodeName("b")]), st.integers(1, 3).map(Incarnation))
events = st.one_of(
    st.builds(
        lambda node, state: Seen(replace(node_info(), id=node, state=state)),
        ids,
        st.sampled_from(NodeState),
    ),
    st.builds(Missing, st.sampled_from([A, NodeName("b")])),
    st.builds(StateObserved, ids, st.sampled_from(NodeState)),
    st.builds(StateTold, ids, st.sampled_from(NodeState)),
    st.builds(Withdrawn, ids),
    st.builds(SessionLost, ids),
    st.builds(SessionOpened, ids),
    st.just(RegistryLost()),
    st.just(Tick()),
)


@given(st.lists(st.tuples(events, st.floats(0.0, 4.0)), max_size=40))
def test_every_order_of_events_keeps_the_machine_consistent(
    steps: list[tuple[Event, float]],
) -> None:
    membership, now = Membership(), 0.0
    view = membership.view
    replaced: dict[NodeId, float] = {}
    for event, passed in steps:
        now += passed
        for instruction in membership.handle(event, now):
            if isinstance(instruction, ViewChanged):
                assert instruction.view != view
                view = instruction.view
            elif instruction.reason != "expired":
                replaced[instruction.node] = now
        membership.check_integrity()
        assert view == membership.view
        for info in view.nodes.values():
            assert now - replaced.pop(info.id, -RETIRED_SECONDS) >= RETIRED_SECONDS
        assert view == ClusterView.of(view.nodes.values())
