"""The one door to the kernel: a module per manual page or header. Only here are ctypes and numbers."""
