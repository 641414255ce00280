"""The lab: a QEMU guest with soft-RoCE, in which pysmc meets real verbs.

`kernel` finds and unpacks the distribution's kernel, `initramfs` makes what it boots
with, `machine` starts it, `needs` says why that cannot be done here. `host` is the
pytest plugin that sends tests marked `lab` into the guest, `guest` the one that runs
them there. `command` is the command line. docs/howto/lab.md tells how it is used.
"""
