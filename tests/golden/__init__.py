"""What earlier Godwits wrote, and every later one must read."""
