"""A worker process: reads requests from a socket that it inherited, answers with outcomes.

Started by :class:`netwright.workshop.local.LocalEngine`; not for use by hand.
"""

import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import cloudpickle
import torch

from netwright.core.portable import unpacked
from netwright.workshop.portable import evaluator

__all__ = ["serve"]


def serve(handle: int, folder: Path) -> None:
    """Answer requests until the other end closes; files made on the way lie in ``folder``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    pipe = Connection(handle)
    os.register_at_fork(after_in_child=pipe.close)  # so that the other end sees when this process, and no child, ends
    try:
        path, subject = unpacked(pipe.recv_bytes())
        sys.path[:] = path
        evaluate = evaluator(subject, folder)
        while True:
            answer = evaluate(cloudpickle.loads(pipe.recv_bytes()))
            pipe.send_bytes(cloudpickle.dumps(answer))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]))
