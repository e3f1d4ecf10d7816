"""How long a test waits for another process, a thread or a socket before it fails."""

from __future__ import annotations

#: Many times what any of them takes, on a machine that has other work too: it only bounds a hang.
PATIENCE_SECONDS = 120
