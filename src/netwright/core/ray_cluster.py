"""A Ray cluster that is there, or one on this machine alone."""

import os
import re
from typing import Any

from netwright.core.errors import NetwrightError

__all__ = ["RayCluster", "import_ray", "reason"]


def import_ray() -> Any:
    """The module ``ray``, an extra that is loaded only where it is asked for.

    Raises:
        NetwrightError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise NetwrightError("--engine ray needs Ray: pip install 'netwright[ray]'.") from error
    return ray


class RayCluster:
    """Ray, connected, with a core for each worker.

    The cluster is the one that ``RAY_ADDRESS`` names or ``ray start`` left on this machine; where there is none, Ray is
    started on this machine alone, and ends with :meth:`close`.

    Args:
        workers: cores that are needed.

    Attributes:
        ray: the module.

    Raises:
        NetwrightError: Ray is not installed, the named cluster cannot be reached, or it has too few cores.
    """

    def __init__(self, workers: int) -> None:
        self.ray = import_ray()
        self._owned = not self.ray.is_initialized()
        if self._owned:
            self._connect(workers)
        cores = int(self.ray.cluster_resources().get("CPU", 0))
        if cores < workers:
            self.close()
            raise NetwrightError(
                f"The Ray cluster has {cores} cores for {workers} workers. Ask for fewer by --workers."
            )

    def close(self) -> None:
        """End a Ray that was started here."""
        if self._owned:
            self.ray.shutdown()

    def _connect(self, workers: int) -> None:
        quiet = {"logging_level": "ERROR", "log_to_driver": False}
        try:
            try:
                self.ray.init(address="auto", **quiet)
            except ConnectionError:
                if os.environ.get("RAY_ADDRESS"):
                    raise
                self.ray.init(address="local", num_cpus=workers, include_dashboard=False, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise NetwrightError(f"The Ray cluster cannot be reached: {reason(str(error))}") from error


def reason(text: str) -> str:
    r"""The first and the last line of an error of Ray's, without its colours; between them stands a traceback.

    Example:
        >>> reason("it failed\n  File x\nValueError: no")
        'it failed ... ValueError: no'
    """
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]
    return " ... ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))[:500]
