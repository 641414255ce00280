"""The end of an interpreter in which a loop was forgotten."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import asyncio, atexit, os
import pysmc.aio.driver
from pysmc.config import Config

pysmc.aio.driver._leave_at_exit = lambda: print("connections")
driver = pysmc.aio.driver.Driver(asyncio.new_event_loop(), Config())

class Device:
    def fileno(self):
        return number
    def arm(self):
        return True

number = os.eventfd(0)
atexit.register(print, "device")  # as a fabric's module does when it is loaded
driver.attend(Device())
"""


def test_connections_end_before_their_device():
    words = [sys.executable, "-W", "ignore::ResourceWarning", "-c", PROGRAM]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["connections", "device"]
