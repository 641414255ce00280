"""The fabrics: what moves memory between two processes.

`base` is the contract; `shm`, `sim` and later `verbs` fulfil it. A fabric knows nothing
of SMC-R's messages. Kernel counterpart: smc_ib.c.
"""
