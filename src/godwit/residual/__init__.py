"""What stays and is reached: one file per kind of tie, both ends side by side."""
