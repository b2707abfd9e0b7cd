#!/bin/sh
# start.sh DIR COMMAND...: become COMMAND, alone in a session, in DIR, with nothing of the caller's left open on 0, 1, 2.
set -eu
script=$(readlink -f "$0")
dir=$1
shift
cd "$dir"
exec </dev/null >stdout 2>stderr
# Fields of stat(5): pid, comm, state, ppid, pgrp, session. The builtin read keeps /proc/self ours.
read -r _ _ _ _ group session _ </proc/self/stat
if [ "$session" != $$ ]; then
    # A group leader may not call setsid(2); setsid(1) then forks, and the shell below is the child.
    [ "$group" = $$ ] && exec setsid --fork sh "$script" "$dir" "$@"
    exec setsid sh "$script" "$dir" "$@"
fi
echo $$ >pid.new
mv pid.new pid
exec "$@"
