"""The version of the distribution, and nothing else.

The build reads it from here (``[tool.hatch.version]`` in pyproject.toml), and
so does ``pysmc.__version__``: one place, no copy.
"""

from __future__ import annotations

__version__ = "0.1.0"
