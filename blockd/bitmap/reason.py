"""Why a bitmap that was kept did not come back as it was."""

from __future__ import annotations

from enum import Enum


class Reason(Enum):
    """The values are those that a query shows. All but the first leave everything dirty."""

    #: Nobody knows what is dirty, or in which granules: the bitmap can only be removed.
    CRASH_UNRECOVERABLE = "crash-unrecoverable"
    #: Something else than blockd wrote to the image, or put another in its place.
    IMAGE_CHANGED = "image-changed"
    #: The image has another size than it had, which blockd did not give it.
    SIZE_CHANGED = "size-changed"
    #: What was kept of the bitmap is damaged, or could not be written when it had to be.
    STATE_DAMAGED = "state-damaged"
