"""As whom a job may act at home."""

from __future__ import annotations

import errno
import functools
import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass, field

from godwit.residual.homefiles.messages import Identity, fail


@dataclass(frozen=True, slots=True)
class Credentials:
    """The ids that the processes of a job have. A job with uid 0 may act as anybody, as root may."""

    uids: frozenset[int]
    gids: frozenset[int]
    groups: tuple[int, ...] = ()  # supplementary
    groups_of: Mapping[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])
    """Those of users that root's job may become, where they differ from what home's user database says."""
    builder: tuple[int, int] | None = None
    """As whom the host's root, who builds the job there, is served if the job is not root's."""

    def identity(self, uid: int, gid: int) -> Identity:
        """Return as whom a request with these ids is to be served.

        Raises:
            OSError: EACCES, the job has no such ids.
        """
        if uid in self.uids:
            if gid in self.gids or gid in self.groups or 0 in self.uids:
                return uid, gid, self.groups
        elif 0 in self.uids:
            known = self.groups_of.get(uid)
            return uid, gid, _groups_at_home(uid, gid) if known is None else known
        elif uid == 0 and self.builder is not None:
            return *self.builder, self.groups
        raise fail(errno.EACCES)


@functools.lru_cache(maxsize=256)
def _groups_at_home(uid: int, gid: int) -> tuple[int, ...]:
    # A job of root that became somebody else: home's own user database says in which groups that one is.
    try:
        return tuple(sorted(os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)))
    except KeyError:
        return ()
