#!/usr/bin/env python3
"""Starts the lab: `tools/run_lab.py run COMMAND`, `shell`, `kernel`."""

from lab.command import main

if __name__ == "__main__":
    raise SystemExit(main())
