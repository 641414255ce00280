"""gunicorn's workers on pysmc's loop: ``gunicorn -k`` takes a class by its name.

* ``pysmc.integrations.gunicorn.UvicornWorker`` for ASGI applications; needs
  uvicorn-worker.
* ``pysmc.integrations.gunicorn.AiohttpWorker`` for aiohttp.web; needs aiohttp.

Each worker process makes its own loop, after the fork. Settings come from the
environment (``PYSMC_...``), which the workers inherit.

Source: the documentation of gunicorn ("worker_class"), of uvicorn-worker and of aiohttp
("Deploying with gunicorn").
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pysmc.integrations.gunicorn_aiohttp import AiohttpWorker
    from pysmc.integrations.gunicorn_uvicorn import UvicornWorker

__all__ = ["AiohttpWorker", "UvicornWorker"]

_HOMES = {
    "AiohttpWorker": ("pysmc.integrations.gunicorn_aiohttp", "gunicorn aiohttp"),
    "UvicornWorker": ("pysmc.integrations.gunicorn_uvicorn", "gunicorn uvicorn-worker"),
}
"""Name of a worker to its module, and to the packages that it stands on."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    home, packages = _HOMES[name]
    try:
        return getattr(import_module(home), name)
    except ModuleNotFoundError as error:
        message = f"{name} needs {error.name}: pip install {packages}"
        raise ModuleNotFoundError(message, name=error.name) from error
