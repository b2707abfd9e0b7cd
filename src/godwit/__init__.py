"""Godwit moves running, unmodified Linux processes from one machine to another."""

__version__ = "0.1.0"
