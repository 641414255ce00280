"""Demands whose test was proven: with the fault put in, the test fails.

Each mutant is one of the kernel's faults, as small as it can be here. The test that is
named in the registry is run with it, as a function, and has to fail; without it, it has
to pass.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from pysmc.aio.negotiation import Negotiation
from pysmc.core.connection import Connection
from pysmc.core.endpoint import Endpoint
from pysmc.core.events import News
from pysmc.core.keeper import Keeper
from pysmc.core.link_group import GroupTable, LinkGroup
from pysmc.fabric.shm_arena import Arena

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
MonkeyPatch = pytest.MonkeyPatch


def load(name: str) -> Any:
    """Load a test module of this folder once, under a name of our own."""
    qualified = f"demands_{name}"
    if qualified not in sys.modules:
        path = HERE / f"test_demands_{name}.py"
        spec = importlib.util.spec_from_file_location(qualified, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[qualified] = module
        spec.loader.exec_module(module)
    return sys.modules[qualified]


def unlist_all(patch: MonkeyPatch) -> None:
    """CVE-2021-47536: the list itself is taken out, not the group."""
    patch.setattr(GroupTable, "remove", lambda self, _: self._groups.clear())


def free_at_once(patch: MonkeyPatch) -> None:
    """CVE-2021-46925: memory goes with our close, whatever the peer still does."""

    def reap(self: Keeper, connection: Connection, now: float) -> None:
        if connection.we_ended:
            self.remove_connection(connection, now, clean=True)

    patch.setattr(Keeper, "reap", reap)


def tell_the_dead(patch: MonkeyPatch) -> None:
    """CVE-2021-46925: a completion is told although nobody is there any more."""
    original = Connection.publish_completed

    def completed(self: Connection, *sequence: Any) -> int:
        return original(self, *sequence) | (News.SPACE if self.we_ended else 0)

    patch.setattr(Connection, "publish_completed", completed)


def put_twice(patch: MonkeyPatch) -> None:
    """CVE-2024-56640: the second path gives the place back again."""
    original = Keeper.remove_connection

    def remove(
        self: Keeper, connection: Connection, now: float, *, clean: bool
    ) -> None:
        if not self.has_connection(connection):
            self.leave(connection.group, now)
        original(self, connection, now, clean=clean)

    patch.setattr(Keeper, "remove_connection", remove)


def forget_the_memory(patch: MonkeyPatch) -> None:
    """CVE-2023-53110: the end of a group forgets what is still being made."""

    def end(self: Keeper, group: LinkGroup, *args: Any, **options: Any) -> None:
        group.rmb_bytes = 0
        original(self, group, *args, **options)

    original = Keeper.end_group
    patch.setattr(Keeper, "end_group", end)


def walk_the_list_itself(patch: MonkeyPatch) -> None:
    """CVE-2023-54318: the groups are walked while they are taken out."""
    patch.setattr(GroupTable, "all", lambda self: self._groups.values())


def tell_a_loss_twice(patch: MonkeyPatch) -> None:
    """CVE-2026-74493: the end of the group does not know who has closed."""
    original = Keeper.end_group

    def end(self: Keeper, group: LinkGroup, *args: Any, **options: Any) -> None:
        original(self, group, *args, **options)
        self._context.events.extend(self._context.events[-1:])

    patch.setattr(Keeper, "end_group", end)


def look_up_without_a_check(patch: MonkeyPatch) -> None:
    """CVE-2026-64541: whoever has the memory now gets what was said to the last one."""
    original = Endpoint.receive_update

    def receive(self: Endpoint, link: Any, update: Any, now: float) -> Any:
        for connection in link.group.connections.values():
            update = (update[0], connection.alert_token, *update[2:])
        return original(self, link, update, now)

    patch.setattr(Endpoint, "receive_update", receive)


def show_what_is_not_there(patch: MonkeyPatch) -> None:
    """CVE-2024-26615: diagnostics look into a link that has no peer yet."""

    def show(self: LinkGroup) -> str:
        return f"<LinkGroup {self.number} {self.links[0].remote.gid.hex()}>"  # type: ignore[union-attr]

    patch.setattr(LinkGroup, "__repr__", show)


def keep_a_failed_attempt(patch: MonkeyPatch) -> None:
    """CVE-2023-53382: the next attempt finds the group of the one that failed."""
    original = GroupTable.remove

    def remove(self: GroupTable, group: LinkGroup) -> None:
        if group.active_link is not None:
            original(self, group)

    patch.setattr(GroupTable, "remove", remove)


def throw_the_confirm_away(patch: MonkeyPatch) -> None:
    """CVE-2022-48909: what TCP has not taken is lost when the client is done."""
    original = Negotiation.established

    def established(self: Negotiation, connection: Connection) -> None:
        self._outbox = b""
        original(self, connection)

    patch.setattr(Negotiation, "established", established)


def leak_a_descriptor(patch: MonkeyPatch) -> None:
    """CVE-2021-47143: what was made before the failure is not undone."""
    patch.setattr(Arena, "close_descriptor", lambda _: None)


class Mutant(NamedTuple):
    """A fault, and how the test that has to notice it is run."""

    put_in: Callable[[MonkeyPatch], None]
    module: str
    test: str
    arguments: dict[str, Any]
    says: str
    """What the test, or the watch, says then: not any failure will do."""


MUTANTS = [
    Mutant(
        unlist_all,
        "core",
        "a_first_contact_that_fails_unlists_no_other_group",
        {"others": 2, "order": "RegisterMemory", "end": "client"},
        "flows of a group that is not there",
    ),
    Mutant(
        free_at_once,
        "core",
        "writes_that_complete_after_the_close_touch_nothing",
        {"count": 7, "how": "success", "ending": "close"},
        "the peer may still write there",
    ),
    Mutant(
        tell_the_dead,
        "core",
        "writes_that_complete_after_the_close_touch_nothing",
        {"count": 7, "how": "success", "ending": "close"},
        "an ended connection is told of its completions",
    ),
    Mutant(
        put_twice,
        "core",
        "giving_up_at_any_step_gives_back_once",
        {"way": "reuse", "end": "both"},
        "places and users differ",
    ),
    Mutant(
        forget_the_memory,
        "core",
        "a_link_that_is_lost_at_any_step_leaves_nothing",
        {"way": "first contact", "end": "both"},
        "self.rmb_bytes == sum(",
    ),
    Mutant(
        walk_the_list_itself,
        "core",
        "a_first_contact_that_fails_unlists_no_other_group",
        {"others": 2, "order": "RegisterMemory", "end": "client"},
        "changed size during iteration",
    ),
    Mutant(
        tell_a_loss_twice,
        "core",
        "a_full_group_ends_while_its_connections_are_closed",
        {"seed": 1},
        "a loss is told once",
    ),
    Mutant(
        look_up_without_a_check,
        "core",
        "a_late_update_does_not_meet_the_next_connection_of_its_memory",
        {},
        "assert found is None",
    ),
    Mutant(
        show_what_is_not_there,
        "core",
        "everything_can_be_shown_at_any_step",
        {"way": "first contact"},
        "no attribute 'gid'",
    ),
    Mutant(
        keep_a_failed_attempt,
        "core",
        "an_attempt_after_a_failed_one_is_like_a_first_one",
        {"way": "first contact", "order": "RegisterMemory", "end": "client"},
        "flows of a group that is not there",
    ),
    Mutant(
        throw_the_confirm_away,
        "loop",
        "a_confirm_that_is_still_in_the_senders_hands",
        {"then": "sent"},
        "TimeoutError",
    ),
    Mutant(
        leak_a_descriptor,
        "setup",
        "each_allocation_of_a_device_may_fail",
        {"number": 12},
        "left something behind",
    ),
]


def play(mutant: Mutant, patch: MonkeyPatch) -> None:
    module = load(mutant.module)
    test = getattr(module, f"test_{mutant.test}")
    arguments = dict(mutant.arguments)
    if "order" in arguments:
        arguments["order"] = getattr(module, arguments["order"])
    if mutant.module != "core":
        arguments["monkeypatch"] = patch
    test(**arguments)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda one: one.put_in.__name__)
def test_a_fault_that_is_put_in_is_noticed(mutant, monkeypatch, invariants) -> None:
    with monkeypatch.context() as patch:
        play(mutant, patch)
    assert invariants.take() == []
    with monkeypatch.context() as patch:
        mutant.put_in(patch)
        patch.setattr(load("loop"), "PATIENCE", 2.0)
        try:
            play(mutant, patch)
        except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001  # of any kind
            noticed = told(error)
        else:
            noticed = ""
    # What is watched in all tests would have failed it as well.
    noticed += "".join(f"\n{broken}" for broken in invariants.take())
    assert mutant.says in noticed, "noticed by something else, or by nothing"


def told(error: BaseException) -> str:
    """Give what an error says, and the line that raised it."""
    line = traceback.extract_tb(error.__traceback__)[-1].line
    return f"{type(error).__name__}: {error} at {line}"


def test_there_are_ten_at_least() -> None:
    assert len(MUTANTS) >= 10
    assert len({mutant.put_in for mutant in MUTANTS}) == len(MUTANTS)
