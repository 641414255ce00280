"""The SMC option on SYN and SYN-ACK, set by small programs that the kernel runs.

A plain socket cannot set a TCP option. Three eBPF programs, attached to a cgroup once
by somebody with CAP_BPF and CAP_NET_ADMIN, set and read it for the sockets that ask.

* `sockets` is for everybody: opt in, read the result.
* `programs` are the three programs, written with `assembler`.
* `bpf` is the system call, `cgroup` finds cgroups, `install` puts the programs there.

Source: RFC 7609 section 3.1 and A.1.
"""
