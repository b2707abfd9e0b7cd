"""Moves: who owns the process now, and how it gets from one machine to another."""
