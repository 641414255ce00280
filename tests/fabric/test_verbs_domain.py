"""Protection domains of the verbs fabric: regions, and what is kept ready."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from pysmc.errors import FabricError, FabricUnavailable, LocalProtocolError
from pysmc.fabric.verbs_memory import SLAB_BYTES
from pysmc.testing.conformance_bench import KIB, Writer, content

if TYPE_CHECKING:
    from pysmc.fabric.verbs_domain import VerbsDomain
    from tests.fabric.fake_verbs import Roce


@pytest.fixture
def domain(roce: Roce) -> VerbsDomain:
    return roce.devices[0].create_domain()


def test_a_region_is_our_own_memory(roce: Roce, domain: VerbsDomain) -> None:
    pair = domain.create_queue_pair()
    region = domain.register(64 * KIB)
    known = roce.libraries[0].memory[region.rkey_on(pair)]
    assert (known.address, known.length) == (region.virtual_address, 64 * KIB)
    region.view[1:4] = b"abc"
    assert content(region, 0, 5) == b"\0abc\0"
    region.view[60 * KIB :] = bytes([1]) * (4 * KIB)
    region.clear(2)
    assert content(region, 0, 5) == b"\0\0bc\0"
    region.clear()
    assert not any(content(region))


@pytest.mark.parametrize("length", [0, 8 * KIB, 24 * KIB, 1 << 30])
def test_a_region_has_a_size_of_the_protocol(domain: VerbsDomain, length: int) -> None:
    with pytest.raises(LocalProtocolError, match=f"a region of {length} bytes"):
        domain.register(length)


def test_pinned_memory_is_counted(roce: Roce, domain: VerbsDomain) -> None:
    device = roce.devices[0]
    before = device.count.bytes
    region = domain.register(256 * KIB)
    assert device.count.bytes == before + 256 * KIB
    region.close()
    region.close()
    assert device.count.bytes == before


def test_a_closed_domain_makes_nothing(domain: VerbsDomain) -> None:
    domain.close()
    domain.close()
    for make in (domain.create_queue_pair, lambda: domain.register(16 * KIB)):
        with pytest.raises(LocalProtocolError, match="domain is closed"):
            make()


def test_what_a_link_group_needs_is_used_again(roce: Roce) -> None:
    """All but the queue pair, whose number old packets may still name."""
    device, library = roce.devices[0], roce.libraries[0]
    numbers = set()
    for _ in range(5):
        domain = device.create_domain()
        numbers.add(domain.create_queue_pair().number)
        domain.close()
    assert len(numbers) == 5
    made = library.made
    assert (made["domain"], made["memory"], made["pair"]) == (1, 2, 5)


def test_only_a_few_are_kept(roce: Roce) -> None:
    device, library = roce.devices[0], roce.libraries[0]
    domains = [device.create_domain() for _ in range(4)]
    for domain in domains:
        for _ in range(3):
            domain.create_queue_pair()
    assert library.open["memory"] == 24
    for domain in domains:
        domain.close()
    assert library.open["domain"] == 2
    assert library.open["memory"] == 4
    assert library.open["pair"] == 0


def test_memory_of_a_queue_pair_is_used_by_the_next(
    roce: Roce, domain: VerbsDomain
) -> None:
    domain.create_queue_pair().close()
    domain.create_queue_pair()
    assert roce.libraries[0].made["memory"] == 2


SHORT, UNUSABLE = "NO_MEMORY", "UNAVAILABLE"
FAILURES: list[tuple[str, tuple[int, ...], str, str]] = [
    ("register", (errno.ENOMEM,), "ENOMEM", SHORT),
    ("register", (0, errno.ENOMEM), "ENOMEM", SHORT),
    ("register", (errno.EINVAL,), "cannot be registered: register: EINVAL", UNUSABLE),
    ("create_queue_pair", (errno.ENOMEM,), "create queue pair: ENOMEM", SHORT),
    ("create_queue_pair", (errno.EINVAL,), "create queue pair: EINVAL", UNUSABLE),
    ("to_init", (errno.EINVAL,), "to init: EINVAL", UNUSABLE),
    ("post_receives", (0, 0, errno.ENOMEM), "post receives: ENOMEM", SHORT),
]


@pytest.mark.parametrize(("operation", "numbers", "words", "status"), FAILURES)
def test_a_queue_pair_that_cannot_be_had_costs_nothing(
    roce: Roce,
    domain: VerbsDomain,
    operation: str,
    numbers: tuple[int, ...],
    words: str,
    status: str,
) -> None:
    library = roce.libraries[0]
    library.fail(operation, *numbers)
    with pytest.raises(FabricError) as caught:
        domain.create_queue_pair()
    assert caught.value.status == status
    assert words in caught.value.detail
    assert library.open["pair"] == 0
    assert domain.queue_pairs == []
    pair = domain.create_queue_pair()  # and the next one can be had
    assert pair.number in roce.world.pairs
    assert library.open["memory"] == 2


def test_what_cannot_even_be_undone_is_one_error(
    roce: Roce, domain: VerbsDomain
) -> None:
    library = roce.libraries[0]
    library.fail("to_init", errno.ENOMEM)
    library.fail("close_pair", errno.EIO)
    with pytest.raises(FabricError, match="to init: ENOMEM"):
        domain.create_queue_pair()
    (left,) = roce.world.pairs.values()
    left.close()


def test_a_region_that_cannot_be_had(roce: Roce, domain: VerbsDomain) -> None:
    before = roce.devices[0].count.bytes
    roce.libraries[0].fail("register", errno.ENOMEM)
    with pytest.raises(FabricError, match="ENOMEM"):
        domain.register(16 * KIB)
    assert roce.devices[0].count.bytes == before
    domain.register(16 * KIB)


def test_what_is_only_kept_ready_makes_room_for_a_region(roce: Roce) -> None:
    device, library = roce.devices[0], roce.libraries[0]
    near, far = roce.bench.link()
    writer = Writer(near, far.domain.register(KIB * KIB), far.queue_pair)
    roce.world.is_held = True
    writer.write(0, bytes(4 * SLAB_BYTES))
    roce.world.is_held = False
    roce.bench.settle()
    other = device.create_domain()
    other.create_queue_pair()
    other.close()
    pinned, memory = device.count.bytes, library.open["memory"]
    library.fail("register", errno.ENOMEM)
    near.domain.register(16 * KIB)
    assert device.count.bytes < pinned - 3 * SLAB_BYTES
    assert library.open["memory"] < memory - 3
    library.fail("register", errno.ENOMEM)
    with pytest.raises(FabricError, match="ENOMEM"):
        near.domain.register(16 * KIB)  # there is no more of it
    writer.write(0, b"still here")
    writer.publish(producer=10)
    roce.bench.await_newest(far, writer)


def test_a_domain_that_cannot_be_had(roce: Roce) -> None:
    roce.libraries[0].fail("create_domain", errno.ENOMEM)
    with pytest.raises(FabricError, match="create domain: ENOMEM") as caught:
        roce.devices[0].create_domain()
    assert caught.value.status == "NO_MEMORY"
    assert roce.devices[0].domains == []


def test_a_domain_that_the_device_does_not_have_is_no_shortage(roce: Roce) -> None:
    roce.libraries[0].fail("create_domain", errno.EOPNOTSUPP)
    with pytest.raises(FabricUnavailable, match="create domain: ENOTSUP"):
        roce.devices[0].create_domain()


def test_a_domain_may_fail_to_be_freed(roce: Roce) -> None:
    library = roce.libraries[0]
    library.fail("close_domain", 0, errno.EIO)
    domains = [roce.devices[0].create_domain() for _ in range(4)]
    for domain in domains:
        domain.close()
    assert library.open["domain"] == 3
    library.open["domain"] -= 1  # nobody can do anything about it


def test_staging_that_grew_is_given_back(roce: Roce) -> None:
    near, far = roce.bench.link()
    region = far.domain.register(1024 * KIB)
    rkey = region.rkey_on(far.queue_pair)
    before = roce.devices[0].count.bytes
    roce.world.is_held = True
    near.queue_pair.post_write(rkey, region.virtual_address, bytes(1024 * KIB))
    assert roce.devices[0].count.bytes == before + 4 * SLAB_BYTES - SLAB_BYTES
    roce.world.is_held = False
    near.domain.close()
    roce.bench.settle()
    assert roce.devices[0].count.bytes == before
