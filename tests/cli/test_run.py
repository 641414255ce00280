"""``pysmc run``: a program cannot tell, except by its loop, that it is run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile

import pytest

LOOPS = """
import asyncio, json, sys
found = []
async def main():
    found.append(type(asyncio.get_running_loop()).__module__)
asyncio.run(main())
with asyncio.Runner() as runner:
    runner.run(main())
loop = asyncio.new_event_loop()
loop.run_until_complete(main())
loop.close()
loop = asyncio.SelectorEventLoop()
loop.run_until_complete(main())
loop.close()
print(json.dumps(found))
"""
FACTS = """
import json, os, sys
print(json.dumps({
    "name": __name__, "file": __file__, "argv": sys.argv, "first": sys.path[0],
    "main": sys.modules["__main__"].__dict__.get("MINE"),
}))
MINE = "seen"
"""
PAIR = """
import asyncio, json
async def handle(reader, writer):
    writer.write(await reader.readline())
    await writer.drain()
    modes.append(writer.get_extra_info("smc").mode)
    writer.close()
async def main():
    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"hello\\n")
    assert await reader.readline() == b"hello\\n"
    modes.append(writer.get_extra_info("smc").mode)
    writer.close()
    await writer.wait_closed()
    server.close()
    await server.wait_closed()
modes = []
asyncio.run(main())
print(json.dumps(modes))
"""

pytestmark = pytest.mark.slow


def test_every_way_of_making_a_loop_makes_ours(pysmc, write):
    done = pysmc("run", write(LOOPS))
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out) == ["pysmc.aio.loop"] * 4


def test_a_program_talks_smc(pysmc, write):
    done = pysmc("run", "--require", write(PAIR))
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out) == ["smcr", "smcr"]


def test_where_smc_is_required_tcp_is_an_error(pysmc, write):
    done = pysmc("run", "--require", write(PAIR), env={"PYSMC_DISCOVERY": ""})
    assert done.code == 1
    assert done.out == ""
    last = done.err.rstrip().splitlines()[-1]
    assert last.startswith("pysmc.errors.Declined: SMC-R is required but not possible")
    assert "DISABLED" in last


def python(environment, tmp_path, *arguments):
    """Run the same with Python itself, which is what it has to look like."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )


def test_a_script_finds_itself_as_under_python(pysmc, write, environment, tmp_path):
    script = write(FACTS, "folder/script.py")
    arguments = ("a b", "--require", "-m", "--help")
    done = pysmc("run", script, *arguments)
    assert (done.code, done.err) == (0, "")
    expected = python(environment, tmp_path, script, *arguments)
    assert json.loads(done.out) == json.loads(expected.stdout)


def test_a_module_finds_itself_as_under_python(pysmc, write, environment, tmp_path):
    write("", "package/__init__.py")
    write(FACTS, "package/module.py")
    arguments = ("-m", "package.module", "x", "--json")
    done = pysmc("run", *arguments)
    assert (done.code, done.err) == (0, "")
    expected = python(environment, tmp_path, *arguments)
    assert json.loads(done.out) == json.loads(expected.stdout)


def test_a_folder_with_a_main_file_is_a_program(pysmc, write):
    write(FACTS, "folder/__main__.py")
    done = pysmc("run", "folder", "1")
    assert (done.code, done.err) == (0, "")
    facts = json.loads(done.out)
    assert (facts["name"], facts["argv"][1:]) == ("__main__", ["1"])


def test_a_zip_file_with_a_main_file_is_a_program(pysmc, tmp_path):
    with zipfile.ZipFile(tmp_path / "program.pyz", "w") as archive:
        archive.writestr("__main__.py", "import inside\nprint(inside.WORD)\n")
        archive.writestr("inside.py", "WORD = 'found'\n")
    done = pysmc("run", "program.pyz")
    assert (done.code, done.out, done.err) == (0, "found\n", "")


def test_neighbours_can_be_imported(pysmc, write):
    write("WORD = 'found'\n", "folder/neighbour.py")
    script = write("import neighbour\nprint(neighbour.WORD)\n", "folder/script.py")
    assert pysmc("run", script).out == "found\n"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("import sys; sys.exit(7)", 7),
        ("import sys; sys.exit('words')", 1),
        ("raise SystemExit", 0),
        ("import os; os._exit(3)", 3),
    ],
)
def test_the_exit_code_is_the_programs(pysmc, write, text, code):
    done = pysmc("run", write(text))
    assert done.code == code
    assert done.err == ("words\n" if "words" in text else "")


def test_a_traceback_ends_like_pythons(pysmc, write, environment, tmp_path):
    text = "def fail():\n    raise KeyError('it')\n\nfail()\n"
    done = pysmc("run", write(text))
    assert done.code == 1
    expected = python(environment, tmp_path, "program.py").stderr.splitlines()
    # Ours begins with the frames of the command; the program's own are the same.
    ours = [line.replace(str(tmp_path) + "/", "") for line in done.err.splitlines()]
    theirs = [line.replace(str(tmp_path) + "/", "") for line in expected]
    assert ours[-len(theirs) + 1 :] == theirs[1:]


def test_ctrl_c_is_the_programs(write, environment, tmp_path):
    text = (
        "import asyncio\n"
        "async def main():\n"
        "    print('on', flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-m", "pysmc", "run", write(text)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"on\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read().rstrip().endswith(b"KeyboardInterrupt")
    assert process.returncode == -signal.SIGINT


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "name a script, or a module after -m"),
        (("-m",), "name a script, or a module after -m"),
        (("missing.py",), "there is no file 'missing.py'"),
        (("-m", "missing_module"), "there is no module 'missing_module'"),
        (("-m", "missing.module"), "there is no module 'missing.module'"),
        (("-m", ".part"), "a module's whole name is wanted, '.part' is relative"),
        (("-m", ""), "there is no module ''"),
        (("empty",), "'empty' is a folder without a file __main__.py"),
    ],
)
def test_mistakes_are_named(pysmc, tmp_path, arguments, words):
    (tmp_path / "empty").mkdir()
    done = pysmc("run", *arguments)
    assert (done.code, done.out, done.err) == (2, "", f"pysmc run: {words}\n")


def test_a_module_that_lacks_another_says_so(pysmc, write):
    write("import missing_module\n", "package/__init__.py")
    done = pysmc("run", "-m", "package.part")
    assert done.code == 1
    assert "ModuleNotFoundError: No module named 'missing_module'" in done.err


def test_a_bad_setting_is_named(pysmc, write):
    done = pysmc("run", write("print('ran')"), env={"PYSMC_RMBE_BYTES": "3"})
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("pysmc run: rmbe_bytes is 3; allowed is ")


def test_settings_reach_the_processes_that_a_program_starts(pysmc, write):
    text = "import os\nprint(os.environ.get('PYSMC_FALLBACK'))\n"
    assert pysmc("run", "--require", write(text)).out == "require\n"
    assert "PYSMC_FALLBACK" not in os.environ
