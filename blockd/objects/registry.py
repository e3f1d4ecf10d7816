"""The objects that there are, by id."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TypeVar

from blockd.errors import BlockdError

_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")

_Kind = TypeVar("_Kind", bound="UserObject")


@dataclass(slots=True, eq=False, kw_only=True)
class UserObject:
    """Something that has an id because a client gave it one."""

    #: What needs the object as long as it is there itself.
    users: int = field(default=0, init=False)


class Objects:
    """All objects share their ids."""

    def __init__(self) -> None:
        self._objects: dict[str, UserObject] = {}

    def check_id(self, object_id: str) -> None:
        """Raise ``BlockdError`` unless a new object may have this id."""
        if not _ID.fullmatch(object_id):
            raise BlockdError("Parameter 'id' expects an identifier")
        if object_id in self._objects:
            raise BlockdError(
                f"attempt to add duplicate property '{object_id}' to object (type 'container')"
            )

    def add(self, object_id: str, made: UserObject) -> None:
        """Keep an object; ``check_id`` has let its id pass."""
        self._objects[object_id] = made

    def find(self, object_id: str, kind: type[_Kind]) -> _Kind | None:
        """The object, if it is there and of this kind."""
        found = self._objects.get(object_id)
        return found if isinstance(found, kind) else None

    def __contains__(self, object_id: str) -> bool:
        return object_id in self._objects

    def remove(self, object_id: str) -> None:
        """Raise ``BlockdError`` where there is none, or something needs it."""
        found = self._objects.get(object_id)
        if found is None:
            raise BlockdError(f"object '{object_id}' not found")
        if found.users:
            raise BlockdError(f"object '{object_id}' is in use, can not be deleted")
        del self._objects[object_id]
