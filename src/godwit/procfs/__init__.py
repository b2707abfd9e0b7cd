"""The text of /proc, as values. Nothing here changes a process, and nothing here is remembered."""
