"""SMC-R (RFC 7609) in user space: asyncio services over shared memory and RDMA.

One line moves a program: ``pysmc.run(main())`` in place of ``asyncio.run(main())``, or
``pysmc.new_event_loop`` wherever a loop factory is wanted. Connections go over SMC-R
where the peer can, and stay exactly TCP where it cannot;
``transport.get_extra_info("smc")`` says which, and why.

Names are loaded on first use, so that ``import pysmc`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pysmc._version import __version__

if TYPE_CHECKING:
    from pysmc.aio.client import open_connection
    from pysmc.aio.loop import Loop, new_event_loop, run
    from pysmc.aio.server import start_server
    from pysmc.aio.streams import StreamReader, StreamWriter
    from pysmc.config import Config
    from pysmc.errors import (
        ConnectionAborted,
        ConnectionReset,
        Declined,
        FabricError,
        FabricUnavailable,
        ForkedError,
        HandshakeTimeout,
        LocalProtocolError,
        PeerClosed,
        ProtocolError,
        RemoteProtocolError,
        SmcError,
    )
    from pysmc.info import ConnectionInfo
    from pysmc.reasons import Reason

__all__ = [
    "Config",
    "ConnectionAborted",
    "ConnectionInfo",
    "ConnectionReset",
    "Declined",
    "FabricError",
    "FabricUnavailable",
    "ForkedError",
    "HandshakeTimeout",
    "LocalProtocolError",
    "Loop",
    "PeerClosed",
    "ProtocolError",
    "Reason",
    "RemoteProtocolError",
    "SmcError",
    "StreamReader",
    "StreamWriter",
    "__version__",
    "new_event_loop",
    "open_connection",
    "run",
    "start_server",
]

_HOMES = {
    "pysmc.aio.client": ("open_connection",),
    "pysmc.aio.loop": ("Loop", "new_event_loop", "run"),
    "pysmc.aio.server": ("start_server",),
    "pysmc.aio.streams": ("StreamReader", "StreamWriter"),
    "pysmc.config": ("Config",),
    "pysmc.errors": (
        "ConnectionAborted",
        "ConnectionReset",
        "Declined",
        "FabricError",
        "FabricUnavailable",
        "ForkedError",
        "HandshakeTimeout",
        "LocalProtocolError",
        "PeerClosed",
        "ProtocolError",
        "RemoteProtocolError",
        "SmcError",
    ),
    "pysmc.info": ("ConnectionInfo",),
    "pysmc.reasons": ("Reason",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
