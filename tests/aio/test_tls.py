"""Who puts TLS on a transport: the loop where it can, else asyncio's SSLProtocol."""

from __future__ import annotations

import asyncio
import datetime
from types import SimpleNamespace

import pytest
import uvloop

from pysmc.aio import tls
from pysmc.testing.authority import Authority


@pytest.fixture(scope="session")
def authority(tmp_path_factory) -> Authority:
    now = datetime.datetime.now(datetime.UTC)
    return Authority(tmp_path_factory.mktemp("authority"), now)


def test_stock_transports_on_uvloop_are_uvloops_business(kit, authority) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        with pytest.raises(TypeError, match="not supported by start_tls"):
            await tls.start_tls(
                loop, SimpleNamespace(), kit.Recorder(), authority.client_context()
            )

    kit.run(scenario, factory=uvloop.new_event_loop)
