"""A worker process: reads requests from a socket that it inherited, answers with outcomes.

Started by :class:`netwright.workshop.local.LocalEngine`; not for use by hand.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import cloudpickle
import torch

from netwright.core.portable import unpacked
from netwright.workshop.evaluation import Evaluator, Outcome, Request

__all__ = ["serve"]


def serve(handle: int, folder: Path) -> None:
    """Answer requests until the other end closes; files made on the way lie in ``folder``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    pipe = Connection(handle)
    try:
        path, subject = unpacked(pipe.recv_bytes())
        sys.path[:] = path
        evaluate = _evaluator(subject, folder)
        while True:
            outcome = evaluate(cloudpickle.loads(pipe.recv_bytes()))
            pipe.send_bytes(cloudpickle.dumps(outcome))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _evaluator(subject: bytes, folder: Path) -> Callable[[Request], Outcome]:
    """Evaluates the subject's candidates, or says of every one why the subject cannot be read here."""
    try:
        return Evaluator(cloudpickle.loads(subject), folder=folder)
    except Exception as error:  # reading runs code of the task's own objects
        reason = f"The task cannot be read in a worker process: {type(error).__name__}: {error}"
        return lambda request: Outcome(request, None, reason, 0.0)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]))
