"""The sans-IO core: what may happen next, without a clock, a socket or a fabric.

`Endpoint` is the door: it owns handshakes, link groups and connections of one process.
What happened outside goes in by its ``receive_*`` and ``*_created`` methods, time goes
in as an argument, orders come out of ``take_actions`` and news out of ``take_events``.

Kernel counterpart: smc_core.c. Reference: RFC 7609 sections 2 and 3.
"""
