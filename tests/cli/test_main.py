"""The command itself: help, version, mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pysmc import __version__
from pysmc.cli import SUBCOMMANDS, main


def test_help_names_every_subcommand(pysmc):
    done = pysmc("--help")
    assert done.code == 0
    assert done.err == ""
    for name in SUBCOMMANDS:
        assert f"\n    {name} " in done.out


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_each_subcommand_explains_every_argument(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: pysmc {name} ")
    section = out.split("options:")[1]
    lines = [line for line in section.splitlines() if line.startswith("  -")]
    following = [*section.splitlines()[1:], ""]
    for line in lines:
        below = following[following.index(line) + 1]
        assert len(line.split("  ")) > 2 or below.startswith(" " * 10), line


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"pysmc {__version__}\n"


def test_nothing_asked_shows_help_and_is_a_mistake(capsys):
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("usage: pysmc ")


def test_unknown_subcommand_names_the_known_ones(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["frobnicate"])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert all(f"'{name}'" in err for name in SUBCOMMANDS)


@pytest.mark.slow
def test_the_installed_script_is_the_same_command(pysmc):
    script = Path(sys.executable).with_name("pysmc")
    done = subprocess.run(
        [script, "--help"], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (0, pysmc("--help").out)


@pytest.mark.slow
def test_help_loads_neither_loop_nor_layouts(environment):
    code = (
        "import sys\n"
        "from pysmc.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'aiohttp', 'rich', 'construct', 'pysmc.aio.loop'}\n"
        "loaded = heavy & set(sys.modules)\n"
        "sys.exit(str(loaded) if loaded else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.slow
def test_nobody_reads_on(environment):
    """``pysmc decode ... | head -1`` ends quietly."""
    cdc = "fe2c0001" + "00" * 40
    with subprocess.Popen(
        [sys.executable, "-m", "pysmc", "decode", "--hex", cdc],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment | {"PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
