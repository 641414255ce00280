"""Errors say which field, and where."""

from __future__ import annotations

import copy
import pickle

import pytest

from smcproto.errors import DecodeError, EncodeError


@pytest.mark.parametrize("kind", [DecodeError, EncodeError])
def test_an_error_names_its_place(kind):
    error = kind("type 9 is unknown", field="type", offset=4)
    assert isinstance(error, ValueError)
    assert str(error) == "type 9 is unknown (field type at byte 4)"
    assert str(kind("too many", field="v2.eids")) == "too many (field v2.eids)"


@pytest.mark.parametrize("kind", [DecodeError, EncodeError])
def test_an_error_survives_being_copied(kind):
    error = kind("m", field="f", offset=1)
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(twin) is kind
        assert (twin.message, twin.field, twin.offset) == ("m", "f", 1)
