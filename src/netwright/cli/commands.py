"""Every command, registered on import."""

from netwright.cli import doctor, measure, methods, optimize, report
from netwright.cli.app import app

__all__ = ["app", "doctor", "measure", "methods", "optimize", "report"]
