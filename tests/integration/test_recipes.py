"""The recipes of the how-to pages, carried out as they stand there."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

PAGES = Path(__file__).resolve().parents[2] / "docs" / "howto"
WITHOUT_RECIPE = {
    "integrations": "a table of the others",
    "tls": "its examples are carried out by tests of TLS",
    "streams": "its examples are carried out by tests of streams",
    "fuzz": "its programs are carried out by tests/fuzz",
    "rdma": "it is carried out in the lab",
    "lab": "its commands are targets that start a guest",
    "option": "it needs privilege: tests/discovery/option carries it out",
}
ASK = "PYSMC_FALLBACK=require python client.py"
CLIENT = """
import asyncio, sys, pysmc

async def main():
    reader, writer = await asyncio.open_connection("127.0.0.1", int(sys.argv[1]))
    writer.write(sys.argv[2].encode())
    print((await reader.read()).decode())
    writer.close()

pysmc.run(main(), config=pysmc.Config(fallback="require"))
"""


def test_every_page_is_carried_out():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("*.py"))
    pages = {path.stem for path in PAGES.glob("*.md")} - WITHOUT_RECIPE.keys()
    assert len(pages) >= 8
    assert [page for page in sorted(pages) if f'follow("{page}"' not in tests] == []


@pytest.mark.slow
def test_uvicorn(follow, free_port, wait_announced):
    _, start = follow("uvicorn", {8000: free_port})
    serve = "uvicorn app:app --port 8000 --loop pysmc:new_event_loop"
    for command in (
        serve,
        "python serve.py",
        f"PYSMC_ALLOWED_UIDS=1001 {serve} --workers 2",
    ):
        server = start(command)
        wait_announced(free_port)
        assert start(ASK).rest() == "hello\n"
        server.interrupt()


@pytest.mark.slow
def test_gunicorn(follow, programs, free_port, wait_announced):
    _, start = follow("gunicorn", {8000: free_port})
    at = "-b 127.0.0.1:8000 -w 2 -k"
    ours = "pysmc.integrations.gunicorn"
    for command, body in {
        f"gunicorn app:app {at} {ours}.UvicornWorker": "hello from ASGI",
        f"gunicorn pages:make_app {at} {ours}.AiohttpWorker": "hello from aiohttp",
        f"gunicorn app:app {at} workers.Worker": "hello from ASGI",
    }.items():
        server = start(command)
        wait_announced(free_port)
        client = programs.start("-c", CLIENT, free_port, "GET / HTTP/1.0\r\n\r\n")
        assert client.rest().endswith(f"\r\n\r\n{body}\n")
        assert server.interrupt(signal.SIGTERM) == 0


@pytest.mark.slow
def test_hypercorn(follow, free_port, wait_announced):
    _, start = follow("hypercorn", {8000: free_port})
    server = start("python serve.py")
    wait_announced(free_port)
    assert start(ASK).rest() == "hello over HTTP/2\n"
    assert server.interrupt(signal.SIGTERM) == 0


@pytest.mark.slow
def test_aiohttp(follow, free_port, wait_announced):
    _, start = follow("aiohttp", {8080: free_port})
    for command in (
        "pysmc run server.py",
        "pysmc run -m aiohttp.web -H 127.0.0.1 -P 8080 server:make_app",
        "python serve.py",
    ):
        server = start(command)
        wait_announced(free_port)
        told = start(ASK).rest()
        assert "mode='smcr'" in told
        assert told.endswith("hello over smcr\n")
        server.interrupt()


@pytest.mark.slow
def test_prefork(follow, programs, free_port, wait_until):
    _, start = follow("prefork", {8080: free_port})
    # Unbuffered, print() writes a line and its end one by one: four processes mix them.
    buffered = {"PYTHONUNBUFFERED": ""}
    server = start("python server.py", env=buffered, start_new_session=True)
    # It ends as a terminal ends it: all of its processes are interrupted.
    programs.may_complain.add(server)
    try:
        workers = {server.line() for _ in range(4)}
        assert len(workers) == 4
        client = programs.start("-c", CLIENT, free_port, "hello\n")
        assert client.rest() == "hello\n\n"
    finally:
        os.killpg(server.pid, signal.SIGINT)
    server.finish()
    # The parent does not wait for its workers.
    wait_until(lambda: server.complaint().count("KeyboardInterrupt\n"), 5)


@pytest.mark.slow
def test_libraries(follow, programs, free_port):
    _, start = follow("libraries", {8765: free_port, 8766: free_port})
    server = start("pysmc run talk_server.py")
    programs.may_complain.add(server)  # of the interrupt that ends it
    assert server.line() == "ready"
    assert start("pysmc run --require talk_client.py").rest() == "hello\n"
    assert "mode='smcr'" in server.line()
    server.interrupt()
    server = start("python echo_server.py")
    programs.may_complain.add(server)
    assert server.line() == "ready"
    client = start("PYSMC_FALLBACK=require python echo_client.py")
    assert client.rest() == "b'hello'\n"
    server.interrupt()


@pytest.mark.slow
def test_pytest(follow):
    """One test on three loops, and one on two."""
    _, start = follow("pytest", {})
    assert "5 passed" in start("pytest test_echo.py").rest()


@pytest.mark.load  # its own threads break the rules of asyncio that debug mode checks
@pytest.mark.slow
def test_jupyter(follow, programs, tmp_path):
    recipe, _ = follow("jupyter", {})
    places = ("HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR")
    notebook = programs.script(
        "notebook",
        env=dict.fromkeys(places, str(tmp_path)),
        is_measured=False,
    )
    agent = programs.agent(env={"PYSMC_FALLBACK": "require"})
    assert notebook.json() == {"ready": True}
    serve, connect, end = recipe.take_cells()
    assert notebook.ask("cell", code=serve) == {"printed": ""}

    # A program that takes nothing but SMC-R, connected to the notebook.
    port = int(notebook.ask("cell", code="port")["printed"])
    (info,) = agent.ask("connect", port=port)["infos"]
    assert info["mode"] == "smcr"
    assert agent.ask("talk", size=1_000_000)["equal"] == 1
    agent.ask("close")

    # The notebook, connected to itself, then to the program.
    said = {"printed": "b'hello'\n'smcr'"}
    assert notebook.ask("cell", code=connect) == said
    assert notebook.ask("cell", code=end) == {"printed": ""}
    port = agent.ask("serve")["port"]
    notebook.ask("cell", code=f"port = {port}")
    assert notebook.ask("cell", code=connect) == said
    assert notebook.ask("cell", code="writer.close()") == {"printed": ""}
    (accepted,) = agent.ask("accepted", count=1, ended=True)["connections"]
    assert accepted["info"]["mode"] == "smcr"
    assert (notebook.finish(), agent.finish()) == (0, 0)
