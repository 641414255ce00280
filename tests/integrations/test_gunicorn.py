"""The workers as classes; as processes they are in tests/integration."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import pytest
from gunicorn.workers.base import Worker  # type: ignore[import-untyped]

import pysmc
from pysmc.integrations import gunicorn


def test_uvicorn_worker_differs_in_its_loop_only():
    (stock,) = gunicorn.UvicornWorker.__bases__
    assert stock.__module__ == "uvicorn_worker._workers"
    settings = gunicorn.UvicornWorker.CONFIG_KWARGS
    assert settings == stock.CONFIG_KWARGS | {"loop": "pysmc:new_event_loop"}


def test_aiohttp_worker_works_on_a_loop_of_its_own(monkeypatch):
    running_on = []

    def work(worker: Worker) -> None:
        assert asyncio.get_event_loop_policy().get_event_loop() is worker.loop
        running_on.append(worker.loop)

    monkeypatch.setattr(Worker, "init_process", work)
    worker = object.__new__(gunicorn.AiohttpWorker)
    try:
        worker.init_process()
        (loop,) = running_on
        assert isinstance(loop, pysmc.Loop)
        assert not loop.is_closed()
    finally:
        asyncio.set_event_loop(None)
        for each in running_on:
            each.close()


@pytest.mark.parametrize(
    ("name", "package", "advice"),
    [
        ("UvicornWorker", "uvicorn_worker", "pip install gunicorn uvicorn-worker"),
        ("AiohttpWorker", "aiohttp.worker", "pip install gunicorn aiohttp"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, name, package, advice):
    monkeypatch.delitem(sys.modules, gunicorn._HOMES[name][0], raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=advice) as caught:
        getattr(gunicorn, name)
    assert caught.value.name == package


def test_no_other_name_is_there():
    with pytest.raises(AttributeError, match="no attribute 'SyncWorker'"):
        _ = gunicorn.SyncWorker


def test_nothing_is_imported_before_a_worker_is_asked_for():
    code = (
        "import json, sys, pysmc.integrations.gunicorn;"
        "print(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(done.stdout))
    assert "pysmc" in loaded
    assert loaded & {"gunicorn", "uvicorn", "uvicorn_worker", "aiohttp"} == set()
