"""Our StreamReader and StreamWriter: what they keep, give and wait for."""

from __future__ import annotations

import asyncio

import pytest

import pysmc


@pytest.fixture
def reader(event_loop_of_test):
    return pysmc.StreamReader(loop=event_loop_of_test)


@pytest.fixture
def event_loop_of_test():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def test_they_are_of_asyncio() -> None:
    assert issubclass(pysmc.StreamReader, asyncio.StreamReader)
    assert issubclass(pysmc.StreamWriter, asyncio.StreamWriter)
