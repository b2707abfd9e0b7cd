"""A stopped task: its registers, its memory, and system calls made inside it."""
