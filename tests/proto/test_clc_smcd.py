"""SMC-D Accept and Confirm can be read and named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from smcproto.clc_smcd import SmcdAccept, SmcdConfirm
from smcproto.clc_v2 import FirstContactExtension, SmcdAcceptExtension
from smcproto.constants import EYECATCHER_SMCD
from smcproto.errors import DecodeError, EncodeError

V1 = SmcdAccept(
    version=1,
    first_contact=False,
    gid=1,
    token=2,
    dmbe_index=3,
    dmbe_size_code=4,
    link_id=5,
)
RELEASE_0 = FirstContactExtension(direct=False, os_type=2, release=0, host_name="h")


@pytest.mark.parametrize(
    ("v2", "size"),
    [
        (None, 48),
        (SmcdAcceptExtension(6, "EID"), 78),
        (SmcdAcceptExtension(6, "EID", RELEASE_0), 114),
        (SmcdAcceptExtension(6, "EID", replace(RELEASE_0, release=1)), 130),
    ],
)
def test_each_form_has_its_size(v2, size):
    message = replace(V1, version=1 if v2 is None else 2, v2=v2)
    data = message.build()
    assert len(data) == size
    assert data[:4] == data[-4:] == EYECATCHER_SMCD
    assert SmcdAccept.parse(data) == message


def test_accept_and_confirm_differ_in_the_type_only():
    confirm = SmcdConfirm(**{name: getattr(V1, name) for name in V1.__match_args__})
    differing = [
        position
        for position, (one, other) in enumerate(
            zip(V1.build(), confirm.build(), strict=True)
        )
        if one != other
    ]
    assert differing == [4]
    with pytest.raises(DecodeError, match="CONFIRM where SmcdAccept"):
        SmcdAccept.parse(confirm.build())


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (replace(V1, version=2), "v2"),
        (replace(V1, v2=SmcdAcceptExtension(1, "E")), "v2"),
        (replace(V1, version=0), "version"),
        (replace(V1, version=3, v2=SmcdAcceptExtension(1, "E")), "version"),
        (replace(V1, gid=1 << 64), "gid"),
        (replace(V1, dmbe_size_code=16), "dmbe_size_code"),
        (replace(V1, version=2, v2=SmcdAcceptExtension(1 << 16, "E")), "chid"),
    ],
)
def test_what_does_not_fit_is_not_built(message, field):
    with pytest.raises(EncodeError) as caught:
        message.build()
    assert caught.value.field == field


def test_it_can_be_logged():
    assert str(V1).startswith("SMC-D Accept version=1 gid=0x1")
    assert "first-contact" in str(replace(V1, first_contact=True))
