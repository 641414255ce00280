"""The asyncio room: the only place where the core, the fabrics and discovery meet.

`driver` carries the core's orders out, `negotiation` takes one TCP socket to its
verdict, `transport` is what the application holds on SMC-R, `loop` swaps the event
loop, `client` and `server` serve loops that are not ours. No thread touches any of it:
everything runs in the loop. Kernel counterpart: af_smc.c.
"""
