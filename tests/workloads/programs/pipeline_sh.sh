#!/bin/bash
# pipeline_sh.sh PYTHON DIR: a pipeline as people type it, long-lived. Its ends verify order, content and the end itself.
set -u
python=$1 dir=$2
here=$(dirname "$(readlink -f "$0")")
cd "$dir" || exit 2
me=$BASHPID

verdict() {
    printf '%s\n' "$1" >"result.$me"
    mv "result.$me" result
    case $1 in ok*) exit 0 ;; *) exit 1 ;; esac
}

"$python" -B "$here/pipeline_end.py" produce | gzip -c | gzip -dc | "$python" -B "$here/pipeline_end.py" check
statuses="${PIPESTATUS[*]}"

[ "$statuses" = "0 0 0 0" ] || verdict "bad: exit statuses $statuses: $(cat problem 2>/dev/null)"
[ "$BASHPID" = "$me" ] || verdict "bad: the shell was $me, is $BASHPID"
[ -s produced ] || verdict "bad: the producer left no count"
produced=$(cat produced)
checked=$(cat checked)
[ "$produced" = "$checked" ] || verdict "bad: produced $produced, checked $checked"
verdict "ok $checked"
