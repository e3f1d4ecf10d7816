"""Which file system a file lies on."""

from __future__ import annotations

import os

#: Where a write may wait for another machine, or for another program, without end.
_REMOTE = frozenset(
    {"9p", "afs", "ceph", "cifs", "gfs2", "glusterfs", "lustre", "nfs", "nfs4", "ocfs2", "smb3"}
)


def is_local(device: int) -> bool:
    """Whether the file system with this ``st_dev`` is known to need nobody else.

    Source: proc_pid_mountinfo(5). Blocks no longer than the kernel takes to list the mounts.
    """
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            for mount in mounts:
                before, _, after = mount.partition(" - ")
                if before.split()[2] == number:
                    kind = after.split()[0]
                    return kind not in _REMOTE and not kind.startswith("fuse")
    except OSError:
        return False
    # btrfs gives its subvolumes numbers that no mount has.
    return True
