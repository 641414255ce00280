"""The core's orders, carried out: one method for each kind of action.

Decides nothing: what succeeded and what failed goes back to the core. When orders are
carried out, and in which order, is the pump's business.

Source: `pysmc.core.actions`; kernel counterparts: smc_ib.c, smc_wr.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pysmc.core import actions
from pysmc.core.roles import Role
from pysmc.errors import FabricError, FabricUnavailable
from pysmc.fabric.base import RemoteQueuePair, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from pysmc.aio.pump import Pump
    from pysmc.core.actions import Action
    from pysmc.core.link import Link
    from pysmc.core.link_group import LinkGroup
    from pysmc.core.rmb import Rmb
    from pysmc.fabric.base import Device, QueuePair

__all__ = ["Orders"]


class Orders:
    """Carries out actions on sockets and devices.

    Args:
        pump: Whose core gets the outcomes.
        devices: By their names.
        links: Of each queue pair; kept up to date here.
    """

    def __init__(
        self,
        pump: Pump,
        devices: dict[str, Device],
        links: dict[QueuePair, Link],
    ) -> None:
        self._pump = pump
        self._devices = devices
        self._links = links
        self.table: dict[type[Action], Callable[[Any], None]] = {
            actions.SendClc: self._send_clc,
            actions.CheckTcp: self._check_tcp,
            actions.CreateQueuePair: self._create_pair,
            actions.ConnectQueuePair: self._connect_pair,
            actions.CloseQueuePair: self._close_pair,
            actions.CloseGroup: self._close_group,
            actions.RegisterMemory: self._register,
            actions.ClearMemory: self._clear,
            actions.DeregisterMemory: self._deregister,
            actions.PostSend: self._post_send,
            actions.PublishUpdate: self._publish_update,
        }
        """Kind of action to what carries it out."""

    def _send_clc(self, action: actions.SendClc) -> None:
        action.handshake.handle.send(action.data)

    def _check_tcp(self, action: actions.CheckTcp) -> None:
        action.handshake.handle.check_tcp()

    def _create_pair(self, action: actions.CreateQueuePair) -> None:
        link = action.link
        group = link.group
        try:
            device = self._device_of(group)
            if group.role is Role.SERVER:
                device.check_callable()
            if group.handle is None:
                group.handle = device.create_domain()
            pair = group.handle.create_queue_pair()
        except FabricError as error:
            self._pump.endpoint.pair_failed(
                link, _status_of(error), error.detail, self._pump.time()
            )
            return
        link.handle = pair
        self._links[pair] = link
        self._pump.endpoint.pair_created(link, pair.number, self._pump.time())

    def _device_of(self, group: LinkGroup) -> Device:
        device = self._devices.get(group.device)
        if device is None:
            operation = "create a queue pair"
            raise FabricUnavailable(operation, "UNAVAILABLE", "the device was removed")
        return device

    def _connect_pair(self, action: actions.ConnectQueuePair) -> None:
        link, remote = action.link, action.remote
        there = RemoteQueuePair(
            peer_id=remote.peer_id,
            gid=remote.gid,
            mac=remote.mac,
            number=remote.qp_number,
            psn=remote.psn,
            mtu_code=remote.mtu_code,
        )
        try:
            link.handle.connect(there, link.local.psn, passive=action.passive)
        except FabricError as error:
            self._pump.endpoint.pair_failed(
                link, _status_of(error), error.detail, self._pump.time()
            )
            return
        self._pump.endpoint.pair_connecting(link, self._pump.time())

    def _close_pair(self, action: actions.CloseQueuePair) -> None:
        pair = action.link.handle
        if pair is not None and self._links.pop(pair, None) is not None:
            self._pump.up.discard(pair)
            pair.flush()
            pair.close(linger=action.in_use)

    def _close_group(self, action: actions.CloseGroup) -> None:
        if action.group.handle is not None:
            action.group.handle.close()

    def _register(self, action: actions.RegisterMemory) -> None:
        rmb: Rmb = action.rmb
        try:
            region = rmb.group.handle.register(rmb.length)
        except FabricError as error:
            self._pump.endpoint.memory_failed(
                rmb, _status_of(error), error.detail, self._pump.time()
            )
            return
        rmb.handle = region
        rkey = region.rkey_on(rmb.group.links[0].handle)
        self._pump.endpoint.memory_registered(
            rmb, region.virtual_address, rkey, self._pump.time()
        )

    def _clear(self, action: actions.ClearMemory) -> None:
        action.rmb.handle.clear(action.count)

    def _deregister(self, action: actions.DeregisterMemory) -> None:
        if action.rmb.handle is not None:
            action.rmb.handle.close()

    def _post_send(self, action: actions.PostSend) -> None:
        pair = action.link.handle
        pair.post_send(action.payload)
        pair.flush()

    def _publish_update(self, action: actions.PublishUpdate) -> None:
        self._pump.publish(action.connection)


def _status_of(error: FabricError) -> str:
    """Give the value of the status that an error names."""
    # What is not there is no fault of the peer, nor of the link.
    return Status.__members__.get(error.status, Status.UNREACHABLE).value
