"""Files at home, reached from the host by the kernel's own protocol: <linux/fuse.h>.

At the host the pod's root is a FUSE mount; `pump` moves its messages, unchanged, to the link and back. At
home `server` answers them, with files found by descriptor and handle, never by path, and as the user the
request names. `watch` tells the host what others at home changed, so that it may keep what it knows.

An operation is one function that takes the `Export` and a `Request`. It returns the parts of its answer,
raises the OSError that the program at the host shall see, or returns `Later` for work that may take long.
"""
