"""The checks of ``pysmc doctor``: each area a module, all of them in `catalogue`.

`check` says what a check is and runs them, `machine` is what they see of this machine.
"""
