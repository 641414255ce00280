"""Two roles, and no third."""

from __future__ import annotations

from pysmc.core.endpoint import Role


def test_the_roles_are_named_as_the_public_info_names_them() -> None:
    assert [role.value for role in Role] == ["client", "server"]
