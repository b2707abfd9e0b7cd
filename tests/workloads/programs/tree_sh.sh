#!/bin/sh
# tree_sh.sh DIR: five processes in two sessions, one of which never buries its dead child, under a POSIX shell. A shell
# would bury it by itself, so the zombie's parent is a sleep; that a zombie can be reaped after a move is for `tree_py`.
set -u
dir=$1
cd "$dir" || exit 2
me=$$
self=$(readlink -f "$0")

if [ "${2-}" = tick ]; then
    # The root's clock: a line every now and then, until the root has seen the `stop` of others.
    while [ ! -e enough ]; do
        sleep 0.02
        echo tick
    done >ticks
    exit 5
fi
if [ "${2-}" = member ]; then
    # Reads the end of its fifo, with a child of its own that does the same.
    sh "$self" "$dir" leaf &
    leaf=$!
    echo "$leaf" >leaf.new
    mv leaf.new leaf
    read -r _ <hold
    wait "$leaf"
    exit $(($? + 1))
fi
if [ "${2-}" = leaf ]; then
    read -r _ <hold_leaf
    exit 20
fi

bad() {
    echo "bad: $1" >"result.$me"
    mv "result.$me" result
    : >enough
    kill "$member" "$leaf" "$ticker" "$holder" 2>/dev/null
    exit 1
}

# expect PID STATES PPID PGRP SESSION: compare with proc(5); names here hold no blanks. T and t: whoever stops us all
# need not do so at once.
expect() {
    read -r pid _ state ppid pgrp session _ <"/proc/$1/stat" || bad "process $1 is gone"
    case $2 in *"$state"*) ;; *) bad "process $1 is in state $state" ;; esac
    [ "$ppid $pgrp $session" = "$3 $4 $5" ] || bad "process $1 has $ppid $pgrp $session, not $3 $4 $5"
}

mkfifo ticks hold hold_leaf hold_zombie
sh "$self" "$dir" tick &
ticker=$!
setsid sh "$self" "$dir" member &
member=$!
(
    sh -c 'read -r _ <hold_zombie; exit 37' &
    echo $! >zombie
    exec sleep 1000000
) &
holder=$!
exec 3<ticks 4<>hold 5<>hold_leaf 6<>hold_zombie
comm=
while [ ! -e leaf ] || [ "$comm" != "(sleep)" ]; do
    read -r _ <&3
    read -r _ comm _ <"/proc/$holder/stat"
done
read -r leaf <leaf
read -r zombie <zombie
echo go >&6
state=
while [ "$state" != Z ]; do
    read -r _ <&3
    read -r _ _ state _ <"/proc/$zombie/stat"
done

count=0
while read -r line <&3; do
    [ "$line" = tick ] || bad "the clock said $line"
    # From here on the clock may end at any time; what it has sent is read to the end.
    [ -e stop ] && : >enough
    [ -e enough ] && continue
    read -r pid _ _ _ pgrp session _ </proc/self/stat
    [ "$pid $pgrp $session" = "$me $me $me" ] || bad "I was $me, am $pid $pgrp $session"
    expect "$ticker" "SRDTt" "$me" "$me" "$me"
    expect "$member" "SRDTt" "$me" "$member" "$member"
    expect "$leaf" "SRDTt" "$member" "$member" "$member"
    expect "$holder" "SRDTt" "$me" "$me" "$me"
    expect "$zombie" "Z" "$holder" "$me" "$me"
    # The last field is the wait status, 37 * 256.
    read -r line <"/proc/$zombie/stat"
    [ "${line##* }" = 9472 ] || bad "the zombie's status is ${line##* }"
    count=$((count + 1))
    echo "$count" >>log
    echo "$count" >alive
done

kill "$holder"
wait "$holder"
[ $? = 143 ] || bad "the zombie's parent left another status"
wait "$ticker"
[ $? = 5 ] || bad "the clock left another status"
echo go >&5
echo go >&4
wait "$member"
[ $? = 21 ] || bad "the session's leader left another status"
expected=0
while read -r number; do
    expected=$((expected + 1))
    [ "$number" = "$expected" ] || bad "log: line $expected is $number"
done <log
[ "$expected" = "$count" ] || bad "log has $expected lines, $count were written"
echo "ok $count ticks" >"result.$me"
mv "result.$me" result
