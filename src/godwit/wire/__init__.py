"""Frames of the migration stream: bytes to values, no sockets and no files."""
