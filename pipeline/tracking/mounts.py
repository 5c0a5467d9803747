"""Which file systems several machines share: a database file does not belong there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

_NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "davfs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2",
    "orangefs", "panfs", "pvfs2", "quobyte", "smb3", "smbfs", "wekafs",
}  # fmt: skip
_LOCAL_FUSE = {
    "encfs", "fuse-overlayfs", "gocryptfs", "lxcfs", "mergerfs", "ntfs-3g", "overlayfs", "portal", "snapfuse",
    "squashfuse",
}  # fmt: skip


class Partition(Protocol):
    """A line of `psutil.disk_partitions(all=True)`."""

    @property
    def mountpoint(self) -> str: ...
    @property
    def fstype(self) -> str: ...


def network_file_system(path: Path, partitions: Sequence[Partition] | None = None) -> str | None:
    """The type of the network file system that a path lies on, such as `nfs4`; None for a disk of this machine.

    The path need not exist yet. An unknown kind of FUSE counts as a network: most are. partitions: this machine's, in
    the order of mounting, unless given.
    """
    if partitions is None:
        import psutil

        partitions = psutil.disk_partitions(all=True)
    where, mount, kind = path.expanduser().resolve(), Path("/"), ""
    for partition in partitions:
        point = Path(partition.mountpoint)
        if where.is_relative_to(point) and point.is_relative_to(mount):  # the deepest; of equals the last covers
            mount, kind = point, partition.fstype.lower()
    family, _, name = kind.partition(".")
    shared = kind in _NETWORK or (family == "fuse" and bool(name) and name not in _LOCAL_FUSE)
    return kind if shared else None
