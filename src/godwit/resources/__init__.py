"""What moves: one file per kind of kernel object, the way out and the way back side by side."""
