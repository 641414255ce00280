"""What other programs need to be told of pysmc, where a loop factory is not enough.

Each module is for one program and imports it only when it is used: pysmc itself depends
on none of them.
"""
