"""Files that a reader must refuse: no regular file, or one without end."""

from __future__ import annotations

import os
from pathlib import Path


def make_odd(kind: str, path: Path) -> None:
    """Put a file of this kind at ``path``, in the place of what was there."""
    path.unlink(missing_ok=True)
    match kind:
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "link to /dev/zero":
            path.symlink_to("/dev/zero")
        case "huge":
            path.touch()
            os.truncate(path, 1 << 40)
        case "loop":
            path.symlink_to(path)
