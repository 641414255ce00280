"""Much data through one connection."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.load

GIBIBYTE = 1 << 30


@pytest.mark.slow
def test_one_gibibyte_through_one_connection(programs):
    server = programs.agent(is_measured=False)
    client = programs.agent(is_measured=False)
    port = server.ask("serve", kind="hash")["port"]
    (info,) = client.ask("connect", port=port)["infos"]
    assert info["mode"] == "smcr"
    hashes = client.ask("upload", total=GIBIBYTE)
    assert hashes["sent"] == hashes["got"]
    (accepted,) = server.ask("accepted", count=1, ended=True)["connections"]
    assert accepted["info"]["mode"] == "smcr"
    assert accepted["received"] == GIBIBYTE
    assert accepted["wrong_at"] is None
