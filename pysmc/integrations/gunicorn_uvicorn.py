"""uvicorn's gunicorn worker on pysmc's loop.

Source: the documentation of uvicorn-worker (CONFIG_KWARGS) and of uvicorn ("loop").
"""

from __future__ import annotations

from typing import Any, ClassVar

from uvicorn_worker import UvicornWorker as StockWorker  # type: ignore[import-untyped]

__all__ = ["UvicornWorker"]


class UvicornWorker(StockWorker):  # type: ignore[misc]
    """A worker for ASGI applications, whose loop is pysmc's.

    Derive from it and override ``CONFIG_KWARGS`` to give uvicorn further settings.
    """

    CONFIG_KWARGS: ClassVar[dict[str, Any]] = {
        **StockWorker.CONFIG_KWARGS,
        "loop": "pysmc:new_event_loop",
    }
