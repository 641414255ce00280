"""What can go wrong on the host's side of the lab."""

from __future__ import annotations


class LabError(Exception):
    """The lab cannot do what was asked for.

    Args:
        text: What happened, with a place for each fact.
        facts: The facts.
    """

    def __init__(self, text: str, *facts: object) -> None:
        super().__init__(text.format(*facts))


class LabMissing(LabError):
    """This machine lacks something; the text says what, and how to get it."""


class NotOffered(LabMissing):
    """This distribution never had it: a lab that is required does without."""


class GuestDied(LabError):
    """QEMU has ended, or the guest did not answer in time."""
