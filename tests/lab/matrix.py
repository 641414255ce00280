"""The table of cells: what a kernel and pysmc, or two of pysmc, have to do together.

A cell says what each end does, stage by stage, what is prepared, and how both ends and
the kernel have to see it. It does not say which end is the kernel: `playing` carries it
out with either of them, and a module of tests for each pair of kinds.

An order is a word and its arguments; `players` has one class for each kind of end,
whose ``do_`` methods are the orders. Before the first stage the ends connect; both
orders of a stage run at the same time, and the next begins when both are carried out.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

__all__ = [
    "CELLS",
    "KINDS",
    "OUR_REASONS",
    "SEEN_BY_KERNEL",
    "Cell",
    "Kind",
    "Order",
    "Seen",
    "Stage",
    "State",
    "by_name",
    "order",
]

KIB, MIB = 1 << 10, 1 << 20

Kind = Literal["kernel", "pysmc"]
"""What an end is: a blocking socket of IPPROTO_SMC, or a connection of pysmc's loop."""
KINDS: tuple[tuple[Kind, Kind], ...] = (
    ("pysmc", "kernel"),
    ("kernel", "pysmc"),
    ("pysmc", "pysmc"),
)
"""Client and server of each table of cells."""

State = Literal["usual", "no_option", "no_device", "other_ueid", "declines"]
"""How an end is prepared: as usual; without the TCP option (plain TCP); with the option
and without a device; with a UEID that the other end lacks; with the option and nothing
to offer, so that it declines."""


class Order(NamedTuple):
    """What one end is told to do; see the ``do_`` methods of `players`."""

    do: str
    arguments: dict[str, Any]


class Stage(NamedTuple):
    """What both ends do at the same time; None waits for the other end."""

    client: Order | None = None
    server: Order | None = None


class Cell(NamedTuple):
    """One row of the table."""

    name: str
    stages: tuple[Stage, ...] = ()
    """After the ends have connected; at their end both connections are closed."""
    client: State = "usual"
    server: State = "usual"
    network: str = ""
    """What netem does to RoCE while the stages last, as tc wants it: "loss 1%"."""
    special: str = ""
    """What the module of tests does itself: see `SPECIAL`."""
    config: dict[str, Any] = {}  # noqa: RUF012  # nobody changes a row
    """Changes of pysmc's configuration, at every end that is pysmc."""
    sysctl: dict[str, int] = {}  # noqa: RUF012
    """Of net.smc, where an end is the kernel; they hold for link groups made after."""
    is_broken: bool = False
    """An end is told of an error: what arrived is a prefix of what was sent."""
    seconds: float = 60.0
    """Limit in the guest."""
    is_quick: bool = False
    """One of the subset for every run."""

    @property
    def is_smcr(self) -> bool:
        """Whether it is on SMC-R; otherwise it has to be on TCP at both ends."""
        return self.client == self.server == "usual"

    @property
    def slug(self) -> str:
        """The name as part of a test's name."""
        return self.name.replace(" ", "-").replace(",", "")


SPECIAL = {
    "crowd": "256 connections at once: 255 in one link group, the last in another",
    "reuse": "a second connection after the first was closed and the group was idle",
    "renewed": "a second connection after the group of the first has ended",
    "idle": "nothing happens for longer than it takes to miss a TEST LINK",
    "kill": "the process of one end is killed, see `Cell.name`",
    "cut": "RoCE of one end is cut, see `Cell.name`",
}
"""What `playing` has to do for a cell beside its stages."""


def order(do: str, **arguments: Any) -> Order:
    """Make an order."""
    return Order(do, arguments)


def sends(count: int, pieces: int = 1) -> Order:
    """Hand over so many bytes, in so many writes of equal size."""
    return order("send", count=count, pieces=pieces)


def receives(count: int) -> Order:
    """Receive exactly so many bytes and compare each."""
    return order("receive", count=count)


def exchanges(count: int) -> Order:
    """Send and receive so many bytes at the same time."""
    return order("exchange", count=count)


def idles(seconds: float) -> Order:
    """Do nothing for so long."""
    return order("idle", seconds=seconds)


HALF_CLOSES = order("finish")
SEES_THE_END = order("end")
"""Receive the end of the stream, and nothing before it."""
SEES_A_RESET = order("reset")
"""Receive until the connection is reset; a prefix of what was sent may come first."""
CLOSES = order("close")
ABORTS = order("abort")
READS_NOTHING = order("hold")
"""Leave what comes in the receive buffer until something is received."""
STALLS = order("stall")
"""Send until nothing goes any more; gives how much went."""
CATCHES_UP = order("catch_up")
"""Receive, a little at a time, all that the other end has handed over in `STALLS`."""


def one_way(count: int, pieces: int = 1) -> tuple[Stage, ...]:
    """Send so many bytes to the server, and then as many back."""
    return (
        Stage(sends(count, pieces), receives(count)),
        Stage(receives(count), sends(count, pieces)),
    )


END = (Stage(CLOSES, SEES_THE_END), Stage(None, CLOSES))
"""The client closes, the server sees it and does the same."""
END_OF_SERVER = (Stage(SEES_THE_END, CLOSES), Stage(CLOSES, None))
SOME = 5000
"""Bytes that fit into every buffer."""
WHERE_TCP = one_way(SOME) + END
"""Where SMC-R is not possible the same connection carries the data."""

CELLS = (
    Cell("connect and close", END, is_quick=True),
    Cell("connect and close by the server", END_OF_SERVER),
    Cell("1 byte", one_way(1) + END, is_quick=True),
    Cell("64 KiB - 1", one_way(64 * KIB - 1) + END),
    Cell("64 KiB", one_way(64 * KIB) + END),
    Cell("64 KiB + 1", one_way(64 * KIB + 1) + END, is_quick=True),
    Cell(
        "16 MiB each way at once",
        (Stage(exchanges(16 * MIB), exchanges(16 * MIB)), *END),
        seconds=180.0,
    ),
    Cell("10,000 small writes", one_way(70_000, 10_000) + END, seconds=180.0),
    Cell(
        "half close of the client",
        (
            Stage(sends(SOME), receives(SOME)),
            Stage(HALF_CLOSES, SEES_THE_END),
            Stage(receives(100 * KIB), sends(100 * KIB)),
            Stage(SEES_THE_END, CLOSES),
            Stage(CLOSES, None),
        ),
        is_quick=True,
    ),
    Cell(
        "half close of the server",
        (
            Stage(receives(SOME), sends(SOME)),
            Stage(SEES_THE_END, HALF_CLOSES),
            Stage(sends(100 * KIB), receives(100 * KIB)),
            Stage(CLOSES, SEES_THE_END),
            Stage(None, CLOSES),
        ),
    ),
    Cell(
        "close of the client with unread data",
        (
            Stage(READS_NOTHING, None),
            Stage(None, sends(SOME)),
            Stage(order("has_unread"), None),
            Stage(CLOSES, SEES_A_RESET),
        ),
        is_broken=True,
        is_quick=True,
    ),
    Cell(
        "close of the server with unread data",
        (
            Stage(None, READS_NOTHING),
            Stage(sends(SOME), None),
            Stage(None, order("has_unread")),
            Stage(SEES_A_RESET, CLOSES),
        ),
        is_broken=True,
    ),
    Cell(
        "abort of the client",
        (*one_way(SOME), Stage(ABORTS, SEES_A_RESET)),
        is_broken=True,
    ),
    Cell(
        "abort of the server",
        (*one_way(SOME), Stage(SEES_A_RESET, ABORTS)),
        is_broken=True,
    ),
    Cell(
        "abort of the client with unsent data",
        (
            Stage(None, READS_NOTHING),
            Stage(STALLS, None),
            Stage(ABORTS, SEES_A_RESET),
        ),
        is_broken=True,
    ),
    Cell(
        "abort of the server with unsent data",
        (
            Stage(READS_NOTHING, None),
            Stage(None, STALLS),
            Stage(SEES_A_RESET, ABORTS),
        ),
        is_broken=True,
    ),
    Cell(
        "slow reader at the server",
        (
            Stage(None, READS_NOTHING),
            Stage(STALLS, None),
            Stage(order("flush"), CATCHES_UP),
            *END,
        ),
        seconds=120.0,
    ),
    Cell(
        "slow reader at the client",
        (
            Stage(READS_NOTHING, None),
            Stage(None, STALLS),
            Stage(CATCHES_UP, order("flush")),
            *END,
        ),
        seconds=120.0,
    ),
    Cell("255 connections in one group and the 256th", special="crowd", seconds=240.0),
    Cell("group reuse after idle", special="reuse", is_quick=True),
    Cell(
        "reconnect after the group died",
        special="renewed",
        config={"idle_group_wait": 0.5},
        is_quick=True,
    ),
    Cell(
        "TEST LINK while idle",
        (*one_way(SOME), Stage(idles(5.0), idles(5.0)), *one_way(SOME), *END),
        special="idle",
        config={"test_link_interval": 1.0},
        sysctl={"smcr_testlink_time": 1},
    ),
    Cell(
        "1 % loss",
        (Stage(exchanges(MIB), exchanges(MIB)), *END),
        network="loss 1%",
        seconds=240.0,
    ),
    Cell("decline by the client", WHERE_TCP, client="declines", is_quick=True),
    Cell("decline by the server", WHERE_TCP, server="declines", is_quick=True),
    Cell("no UEID in common", WHERE_TCP, server="other_ueid", is_quick=True),
    Cell("option but no device at the client", WHERE_TCP, client="no_device"),
    Cell("option but no device at the server", WHERE_TCP, server="no_device"),
    Cell("no option at the client", WHERE_TCP, client="no_option"),
    Cell("no option at the server", WHERE_TCP, server="no_option", is_quick=True),
    Cell("client killed", special="kill", is_broken=True),
    Cell("server killed", special="kill", is_broken=True),
    Cell("link of the client cut", special="cut", is_broken=True),
    Cell("link of the server cut", special="cut", is_broken=True),
    Cell("version 2.0", one_way(64 * KIB + 1) + END, config={"release": 0}),
    Cell("version 2.0, group reuse", special="reuse", config={"release": 0}),
)


def by_name(name: str) -> Cell:
    """Find a cell."""
    (cell,) = [cell for cell in CELLS if cell.name == name]
    return cell


class Seen(NamedTuple):
    """How the kernel sees its own end after a fallback: what smc_diag says."""

    reason: int
    peer_diagnosis: int = 0


NO_DEVICE, PEER_NO_SMC, PEER_DECLINED = 0x03030000, 0x03010000, 0x05000000
NO_SMCR_DEVICE = 0x03030002

SEEN_BY_KERNEL: dict[tuple[str, str], Seen] = {
    ("decline by the client", "client"): Seen(NO_DEVICE),
    ("decline by the server", "client"): Seen(PEER_DECLINED, NO_DEVICE),
    ("no UEID in common", "client"): Seen(PEER_DECLINED, NO_DEVICE),
    ("option but no device at the client", "client"): Seen(NO_DEVICE),
    ("option but no device at the server", "client"): Seen(PEER_DECLINED, NO_DEVICE),
    ("no option at the server", "client"): Seen(PEER_NO_SMC),
    ("decline by the client", "server"): Seen(PEER_DECLINED, NO_DEVICE),
    ("decline by the server", "server"): Seen(NO_DEVICE),
    ("no UEID in common", "server"): Seen(NO_DEVICE),
    ("option but no device at the client", "server"): Seen(PEER_DECLINED, NO_DEVICE),
    ("option but no device at the server", "server"): Seen(NO_SMCR_DEVICE),
    ("no option at the client", "server"): Seen(PEER_NO_SMC),
}
"""By the cell and the kernel's role. An end without the option has no SMC socket."""

OUR_REASONS: dict[tuple[str, str], str] = {
    ("decline by the client", "server"): "PEER_DECLINED",
    ("decline by the server", "server"): "NO_COMMON_EID",
    ("no UEID in common", "server"): "NO_COMMON_EID",
    ("option but no device at the client", "server"): "PEER_DECLINED",
    ("option but no device at the server", "server"): "NO_DEVICE",
    ("no option at the client", "server"): "PEER_NO_SMC",
    ("no option at the server", "server"): "PEER_NO_SMC",
    ("decline by the client", "client"): "NO_DEVICE",
    ("decline by the server", "client"): "PEER_DECLINED",
    ("no UEID in common", "client"): "PEER_DECLINED",
    ("option but no device at the client", "client"): "NO_DEVICE",
    ("option but no device at the server", "client"): "PEER_DECLINED",
    ("no option at the client", "client"): "PEER_NO_SMC",
    ("no option at the server", "client"): "PEER_NO_SMC",
}
"""What pysmc says, by the cell and its role."""
