"""Entries to bytes and back."""
