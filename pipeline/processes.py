"""Worker processes that do not outlive the process that started them."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """For the start of a worker: it ends when its parent is gone, killed or left by `os._exit`.

    A worker of a fork server is forked by that server, which lives on as long as a worker does; a worker of a process
    pool waits for tasks at a pipe whose other end it holds itself. Without this both would stay behind for good.
    """
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)
