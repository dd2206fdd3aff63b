"""Netwright makes networks better: faster, smaller, measured on your own machine."""

__version__ = "0.1.0"
