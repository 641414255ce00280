"""Every named state that an endpoint can be in, and how to bring one there.

`STATES` is a table: name to what it is called in words and the recipe that leads there,
in two cores back to back. The handshake's states are there for both roles, for first
contact and for a reused group; the connection's are the joint states of the close, with
and without bytes on their way; the link's are the flows that can be open on it.

Source: the tables in `pysmc.core.handshake`, `pysmc.core.link`, `pysmc.core.close`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from pysmc.core.actions import (
    CheckTcp,
    ConnectQueuePair,
    CreateQueuePair,
    RegisterMemory,
)
from pysmc.core.close import JOINT, Side
from pysmc.core.handshake import HandshakeState
from pysmc.core.roles import Role
from pysmc.reasons import reason
from pysmc.testing.pair import SMALL, CorePair
from smcproto import clc, llc
from smcproto.constants import DeleteLinkReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from pysmc.config import Config
    from pysmc.core.actions import Action
    from pysmc.core.connection import Connection
    from pysmc.core.handshake import Handshake
    from pysmc.core.link import Link
    from pysmc.testing.pair import PairEnd

__all__ = ["STATES", "Scene", "StateRow"]

KINDS = ("answer", "tcp", "connected", "send", "update", "publish", "down")
GARBAGE = b"GET / HTTP/1.1\r\n"


class Scene:
    """Two cores, and which of them is looked at.

    Args:
        role: Of the endpoint that is looked at.
        config: Of both.
        bystanders: Whether the endpoint also has a connection on the same group, where
            there is one, and one on the group of somebody else.
    """

    def __init__(self, role: Role, config: Config, *, bystanders: bool = False) -> None:
        self.pair = CorePair(config, publish_later=True)
        self.role = role
        is_client = role is Role.CLIENT
        self.me = self.pair.client if is_client else self.pair.server
        self.peer = self.me.peer
        self.has_bystanders = bystanders
        self.bystanders: tuple[Connection, ...] = ()
        if bystanders:
            self.bystanders = (self._establish("somebody else"),)
        self.handshake: Handshake | None = None
        self.peer_handshake: Handshake | None = None
        self.connection: Connection | None = None
        self.peer_connection: Connection | None = None

    def _establish(self, peer_key: str = "host") -> Connection:
        opened = self.pair.establish(peer_key=peer_key)
        return opened[0 if self.role is Role.CLIENT else 1]

    @property
    def link(self) -> Link | None:
        """The link that messages arrive on."""
        if self.connection is not None:
            return self.connection.link
        return None if self.handshake is None else self.handshake.link

    # Handshakes

    def connect(self) -> HandshakeState:
        """Begin a handshake; nothing is delivered."""
        both = self.pair.connect()
        mine, theirs = both if self.role is Role.CLIENT else both[::-1]
        self.handshake, self.peer_handshake = mine, theirs
        return mine.state

    def until(self, state: HandshakeState) -> None:
        """Step until the handshake is in a state, then let the peer alone go on."""
        handshake = self.handshake
        assert handshake is not None
        self.pair.drive_until(lambda: handshake.state is state)
        self.freeze()

    def freeze(self) -> None:
        """Deliver nothing more to the endpoint, and let the peer do all that it can."""
        for kind in KINDS:
            self.pair.hold(kind, self.me)
        self.pair.drive()

    def reuse(self) -> None:
        """Let the handshake that follows find a group."""
        fellow = self._establish()
        if self.has_bystanders:
            self.bystanders = (*self.bystanders, fellow)

    # Connections

    def establish(self) -> None:
        """Bring a connection to both ends."""
        if self.has_bystanders:
            self.reuse()
        self.connect()
        assert self.handshake is not None
        assert self.peer_handshake is not None
        self.pair.drive()
        self.connection = self.pair.connection(self.handshake)
        self.peer_connection = self.pair.connection(self.peer_handshake)

    @property
    def both(self) -> tuple[Connection, Connection]:
        """The connection at this end and at the other one."""
        assert self.connection is not None
        assert self.peer_connection is not None
        return self.connection, self.peer_connection

    def say(self, end: PairEnd, side: Side) -> None:
        """Let an end say how far it has closed."""
        connection = self.both[0 if end is self.me else 1]
        match side:
            case Side.DONE:
                self.pair.shutdown_write(end, connection)
            case Side.CLOSED:
                self.pair.close(end, connection)
            case Side.ABORTED:
                self.pair.abort(end, connection)


class StateRow(NamedTuple):
    """One row of `STATES`."""

    role: Role
    words: str
    """What this state is."""
    recipe: Callable[[Scene], None]
    """Brings a fresh scene there."""
    release: int = 1
    """Release of SMC-Rv2 that it needs: 0 is version 2.0."""

    def scene(self, config: Config = SMALL, *, bystanders: bool = False) -> Scene:
        """Make an endpoint that is in this state.

        Args:
            config: Of both ends; `release` is this row's.
            bystanders: Whether it also has connections that this one is none of the
                business of: one on the same group where there is one, and one on the
                group of somebody else.
        """
        config = replace(config, release=min(config.release, self.release))
        scene = Scene(self.role, config, bystanders=bystanders)
        self.recipe(scene)
        scene.freeze()
        return scene


# How to get into states of the handshake


def _awaits(state: HandshakeState, scene: Scene) -> None:
    scene.connect()
    scene.until(state)


def _awaits_first(scene: Scene) -> None:
    scene.connect()


def _awaits_accept_reusing(scene: Scene) -> None:
    scene.reuse()
    scene.pair.hold("tcp", scene.me)
    scene.connect()
    scene.pair.drive()


def _awaits_confirm_reusing(scene: Scene) -> None:
    scene.reuse()
    scene.connect()
    scene.until(HandshakeState.AWAIT_CONFIRM)
    # The client announces its memory before it confirms.
    scene.pair.release("send", scene.me)
    scene.pair.drive()


def _prepares(order: type[Action], scene: Scene) -> None:
    scene.pair.withhold(scene.me, order)
    scene.connect()
    scene.until(HandshakeState.PREPARING)
    _go_on_alone(scene)


def _go_on_alone(scene: Scene) -> None:
    """Let the fabric answer what is not withheld, and nothing else arrive."""
    scene.pair.release("answer", scene.me)
    scene.pair.drive()


def _registers_reusing(scene: Scene) -> None:
    scene.reuse()
    scene.pair.withhold(scene.me, RegisterMemory)
    scene.connect()
    scene.until(HandshakeState.PREPARING)


def _queues(scene: Scene) -> None:
    scene.pair.hold("tcp", scene.peer)
    scene.pair.connect()
    scene.pair.drive()
    scene.connect()
    scene.until(HandshakeState.QUEUED)


def _loses_link_before_confirm(scene: Scene) -> None:
    scene.connect()
    scene.until(HandshakeState.AWAIT_CONFIRM)
    _lose_link(scene)


def _lose_link(scene: Scene) -> None:
    link = scene.link
    assert link is not None
    scene.me.feed_loss(link, "peer gone", "")
    scene.pair.settle(scene.me)


def _waits_for_a_connected_pair(scene: Scene) -> None:
    scene.pair.hold("connected", scene.me)
    scene.connect()
    scene.until(HandshakeState.AWAIT_LINK)


def _awaits_link(scene: Scene) -> None:
    scene.pair.hold("send", scene.me)
    scene.connect()
    scene.pair.drive()


def _awaits_decline(scene: Scene) -> None:
    scene.pair.hold("send", scene.pair.client)
    scene.connect()
    # A kernel's server may decline by now, so a client waits; a server always does.
    scene.pair.advance(2.5)
    _lose_link(scene)


def _hands_over(scene: Scene) -> None:
    scene.pair.withhold(scene.me, CheckTcp)
    scene.connect()
    scene.until(HandshakeState.HANDOVER)


def _answers_late(scene: Scene) -> None:
    _awaits_link(scene)
    # Longer than a kernel's server waits for the answer.
    scene.pair.advance(2.5)
    scene.pair.release("send", scene.me)
    scene.pair.drive()


def _fell_back(scene: Scene) -> None:
    scene.connect()
    assert scene.handshake is not None
    is_client = scene.role is Role.CLIENT
    refusal = reason("LIMIT", "local")
    scene.handshake.refusal = None if is_client else refusal
    if is_client:
        assert scene.peer_handshake is not None
        scene.peer_handshake.refusal = refusal
    scene.pair.drive()


def _failed(scene: Scene) -> None:
    scene.connect()
    assert scene.handshake is not None
    scene.me.feed_tcp(scene.pair.tcp(scene.handshake), GARBAGE[:8])
    scene.pair.settle(scene.me)


def _hears_early(scene: Scene) -> None:
    _awaits_confirm_reusing(scene)
    assert scene.peer_handshake is not None
    theirs = scene.pair.connection(scene.peer_handshake)
    scene.pair.write(scene.peer, theirs, bytes(100))
    scene.pair.release("update", scene.me)
    scene.pair.drive()


def _loses_group_reusing(scene: Scene) -> None:
    _awaits_confirm_reusing(scene)
    _lose_link(scene)


# How to get into states of a connection


def _established(scene: Scene) -> None:
    scene.establish()


def _has_unread(scene: Scene) -> None:
    scene.establish()
    scene.pair.write(scene.peer, scene.both[1], bytes(100))
    scene.pair.drive()


def _has_full_window(scene: Scene) -> None:
    scene.establish()
    scene.pair.hold("update", scene.peer)
    scene.pair.write(scene.me, scene.both[0], bytes(scene.both[0].peer_rmbe_bytes + 1))
    scene.pair.drive()


def _has_full_element(scene: Scene) -> None:
    scene.establish()
    scene.pair.write(scene.peer, scene.both[1], bytes(scene.both[0].rmbe_bytes + 1))
    scene.pair.drive()


def _has_publish_posted(scene: Scene) -> None:
    scene.establish()
    scene.pair.hold("publish", scene.me)
    scene.pair.write(scene.me, scene.both[0], bytes(100))
    scene.pair.drive()


def _joint(ours: Side, peers: Side, unread: int, scene: Scene) -> None:
    """Bring a connection to a joint state; each side says its part in one go."""
    scene.establish()
    pair, me, peer = scene.pair, scene.me, scene.peer
    pair.hold("update", peer)
    if unread:
        pair.write(peer, scene.both[1], bytes(unread))
    scene.say(me, ours)
    if peers is Side.ABORTED and ours not in {Side.CLOSED, Side.ABORTED}:
        # A driver answers at once; what is looked at is the moment before.
        pair.hold("update", me)
        scene.say(peer, peers)
        connection, _ = scene.both
        stub = connection.link.handle
        while stub.updates:
            update = stub.updates.popleft()
            me.endpoint.receive_update(connection.link, update, pair.now)
    elif peers is not Side.OPEN:
        scene.say(peer, peers)
    pair.drive()


def _loses_link(scene: Scene) -> None:
    scene.establish()
    _lose_link(scene)


def _group_deleted(scene: Scene) -> None:
    scene.establish()
    delete = llc.DeleteLink(
        version=2,
        response=False,
        link_number=0,
        reason=DeleteLinkReason.PROGRAM,
        whole_group=True,
    )
    scene.pair.send_message(scene.both[1].link, delete.build())
    scene.pair.drive()


# How to get into states of a link


def _tests_link(scene: Scene) -> None:
    scene.establish()
    scene.pair.hold("send", scene.me)
    # Both ends ask; the peer answers, and neither of the two arrives.
    scene.pair.advance(30.0)
    scene.pair.run_timers()


def _confirms_rkey(scene: Scene) -> None:
    scene.reuse()
    if scene.role is Role.CLIENT:
        scene.connect()
        scene.until(HandshakeState.PREPARING)
        return
    scene.pair.hold("send", scene.me)
    scene.connect()
    scene.pair.drive()


def _deletes_rkey(scene: Scene) -> None:
    scene.establish()
    scene.pair.hold("update", scene.peer)
    scene.pair.hold("send", scene.me)
    scene.pair.close(scene.me, scene.both[0])
    # The peer does not close in time, so its key is withdrawn.
    scene.pair.advance(10.0)


def _is_idle(scene: Scene) -> None:
    scene.establish()
    scene.pair.close(scene.me, scene.both[0])
    scene.pair.close(scene.peer, scene.both[1])
    scene.pair.drive()


def _doubts(scene: Scene) -> None:
    _awaits_confirm_reusing(scene)
    assert scene.handshake is not None
    decline = clc.Decline(
        version=2, out_of_sync=True, peer_id=bytes(8), diagnosis=0x04000000
    ).build()
    tcp = scene.pair.tcp(scene.handshake)
    tcp.transit.clear()
    for part in (decline[:8], decline[8:]):
        scene.me.feed_tcp(tcp, part)
    scene.pair.settle(scene.me)


_C, _S, _H = Role.CLIENT, Role.SERVER, HandshakeState

_HANDSHAKES: dict[str, StateRow] = {
    # First contact, client
    "client/await-accept": StateRow(_C, "the Proposal was sent", _awaits_first),
    "client/preparing/queue-pair": StateRow(
        _C,
        "a first Accept came; the queue pair is being made",
        partial(_prepares, CreateQueuePair),
    ),
    "client/preparing/memory": StateRow(
        _C,
        "the queue pair is there; memory is being registered",
        partial(_prepares, RegisterMemory),
    ),
    "client/preparing/connecting": StateRow(
        _C,
        "the memory is there; connecting has not begun",
        partial(_prepares, ConnectQueuePair),
    ),
    "client/await-link": StateRow(
        _C, "the Confirm was sent; CONFIRM LINK is awaited", _awaits_link
    ),
    "client/await-add-link": StateRow(
        _C,
        "version 2.0: CONFIRM LINK is through, ADD LINK is awaited",
        partial(_awaits, _H.AWAIT_ADD_LINK),
        release=0,
    ),
    "client/await-decline": StateRow(
        _C, "the first link is lost; a server may have declined", _awaits_decline
    ),
    "client/handover": StateRow(
        _C, "the link is confirmed; TCP is looked at a last time", _hands_over
    ),
    "client/late": StateRow(
        _C, "CONFIRM LINK was answered late; a Decline may come", _answers_late
    ),
    "client/fell-back": StateRow(_C, "the server declined", _fell_back),
    "client/failed": StateRow(_C, "the server sent no CLC message", _failed),
    # Reuse, client
    "client/reuse/await-accept": StateRow(
        _C,
        "the Proposal was sent; there is a group with the server",
        _awaits_accept_reusing,
    ),
    "client/reuse/preparing/memory": StateRow(
        _C, "a reusing Accept came; memory is being registered", _registers_reusing
    ),
    "client/reuse/preparing/rkey": StateRow(
        _C, "the memory is there; CONFIRM RKEY was sent", _confirms_rkey
    ),
    # First contact, server
    "server/await-proposal": StateRow(_S, "TCP was accepted", _awaits_first),
    "server/queued": StateRow(
        _S, "a Proposal came; another first contact is in progress", _queues
    ),
    "server/preparing/queue-pair": StateRow(
        _S,
        "a first Proposal came; the queue pair is being made",
        partial(_prepares, CreateQueuePair),
    ),
    "server/preparing/memory": StateRow(
        _S,
        "the queue pair is there; memory is being registered",
        partial(_prepares, RegisterMemory),
    ),
    "server/await-confirm": StateRow(
        _S, "a first Accept was sent", partial(_awaits, _H.AWAIT_CONFIRM)
    ),
    "server/await-confirm/link-lost": StateRow(
        _S, "the same, and the queue pair is gone", _loses_link_before_confirm
    ),
    "server/await-link/connecting": StateRow(
        _S,
        "the Confirm came; the queue pair is connecting",
        _waits_for_a_connected_pair,
    ),
    "server/await-link": StateRow(
        _S,
        "CONFIRM LINK was sent; its answer is awaited",
        _awaits_link,
    ),
    "server/await-add-link": StateRow(
        _S,
        "version 2.0: the link is confirmed, ADD LINK was sent",
        partial(_awaits, _H.AWAIT_ADD_LINK),
        release=0,
    ),
    "server/await-decline": StateRow(
        _S, "the first link is lost; the client will decline", _awaits_decline
    ),
    "server/handover": StateRow(
        _S, "the link is confirmed; TCP is looked at a last time", _hands_over
    ),
    "server/fell-back": StateRow(_S, "it declined", _fell_back),
    "server/failed": StateRow(_S, "the client sent no CLC message", _failed),
    # Reuse, server
    "server/reuse/preparing/memory": StateRow(
        _S,
        "a Proposal came that finds a group; memory is being registered",
        _registers_reusing,
    ),
    "server/reuse/preparing/rkey": StateRow(
        _S, "the memory is there; CONFIRM RKEY was sent", _confirms_rkey
    ),
    "server/reuse/await-confirm": StateRow(
        _S,
        "a reusing Accept was sent",
        _awaits_confirm_reusing,
    ),
    "server/reuse/await-confirm/heard": StateRow(
        _S, "the same, and the client's first update came", _hears_early
    ),
    "server/reuse/await-confirm/group-ended": StateRow(
        _S, "the same, and the group has ended", _loses_group_reusing
    ),
    "server/reuse/doubted": StateRow(
        _S, "a Decline said out of sync; the group is tested", _doubts
    ),
}


def _connections(role: Role) -> dict[str, StateRow]:
    name = role.value
    rows = {
        "active": ("nothing is on its way", _established),
        "active/unread": ("100 bytes are unread", _has_unread),
        "active/window-full": (
            "the peer's element is full; we are blocked",
            _has_full_window,
        ),
        "active/element-full": (
            "our element is full; the peer is blocked",
            _has_full_element,
        ),
        "active/posted": ("a publish has not completed", _has_publish_posted),
        "link-lost": ("the link failed under a connection", _loses_link),
        "group-deleted": (
            "the peer ended the group under a connection",
            _group_deleted,
        ),
        "link/tested": ("TEST LINK was sent", _tests_link),
        "link/delete-rkey": (
            "we closed, the peer did not in time; DELETE RKEY was sent",
            _deletes_rkey,
        ),
        "link/idle": ("both have closed; the group is idle", _is_idle),
    }
    return {f"{name}/{key}": StateRow(role, *row) for key, row in rows.items()}


def _closes(role: Role) -> dict[str, StateRow]:
    rows = {}
    for ours, peers in product(Side, Side):
        if ours is peers is Side.OPEN:
            continue
        name = f"{role.value}/close/{ours.value}-{peers.value}"
        words = f"{JOINT[ours, peers]}: we are {ours.value}, the peer {peers.value}"
        rows[name] = StateRow(role, words, partial(_joint, ours, peers, 0))
        if ours in {Side.OPEN, Side.DONE}:
            # Whoever has closed or aborted has given up what was unread.
            rows[f"{name}/unread"] = StateRow(
                role,
                f"{words}; 100 bytes are unread",
                partial(_joint, ours, peers, 100),
            )
    return rows


STATES: dict[str, StateRow] = {
    **_HANDSHAKES,
    **_connections(_C),
    **_closes(_C),
    **_connections(_S),
    **_closes(_S),
}
"""Every state by its name: role, then what it is in, then what is special about it."""
