#!/usr/bin/env bash
# Keeps a training run going: starts it again with --resume when it was preempted or has crashed.
#
#     launch/supervise.sh COMMAND...
#     launch/supervise.sh .venv/bin/python -m flowrl_jax.train --config=FILE --workdir=DIR
#
# The command's exit code decides (docs/configuration.md):
#     0      done: stops with 0
#     2      wrong input, which another try would not mend: stops with 2
#     3      the run's alarm stopped it, a checkpoint is saved: stops with 3
#     75     preempted, a checkpoint is saved: starts again with --resume
#     other  a crash: starts again with --resume, unless too many in a row came quickly
#
# SIGTERM, SIGINT and SIGUSR1 mean that this machine is going away: the command gets SIGTERM, has the
# grace period to save its checkpoint, and is not started again. The exit code is then the command's.
#
# Settings, from the environment, in seconds (fractions too) unless said otherwise:
#     FLOWRL_GRACE_SECONDS   90   between SIGTERM and SIGKILL
#     FLOWRL_PAUSE_SECONDS   10   before the first restart; doubles while runs end quickly
#     FLOWRL_PAUSE_MAX       600  longest pause
#     FLOWRL_QUICK_SECONDS   300  a run that ends sooner ended quickly
#     FLOWRL_QUICK_FAILURES  5    crashes in a row, all quick, after which it gives up (a number)
#     FLOWRL_JOIN_SECONDS    300  whole seconds that the processes of a run wait for each other
set -uo pipefail

readonly WRONG_INPUT=2 ALARMED=3 PREEMPTED=75
readonly GRACE=${FLOWRL_GRACE_SECONDS:-90}
readonly QUICK=${FLOWRL_QUICK_SECONDS:-300}
# A process that is missing is started again, or its host is being installed: worth waiting for.
export FLOWRL_JOIN_SECONDS=${FLOWRL_JOIN_SECONDS:-300}
readonly QUICK_FAILURES=${FLOWRL_QUICK_FAILURES:-5}

child='' stopping='' killer=''

say() { printf 'supervise: %s\n' "$*" >&2; }

# Bash counts in integers: times are milliseconds inside.
now_ms() { printf '%s' "$((${EPOCHREALTIME/[.,]/} / 1000))"; }
to_ms() { awk -v seconds="$1" 'BEGIN { printf "%d", seconds * 1000 }'; }
to_seconds() { awk -v ms="$1" 'BEGIN { print ms / 1000 }'; }

# On a signal: the command's turn to save.
pass_on() {
    [[ -n $stopping ]] && return
    stopping=1
    [[ -n $child ]] || return
    say "this machine is going away: the run has $GRACE s to save a checkpoint"
    kill -TERM "$child" 2>/dev/null
    # With our output open the killer would keep whoever reads it waiting.
    { sleep "$GRACE" && kill -KILL "$child"; } >/dev/null 2>&1 &
    killer=$!
}

# Runs a command; leaves its exit code in `code`.
run_once() {
    "$@" &
    child=$!
    [[ -n $stopping ]] && kill -TERM "$child" 2>/dev/null # the signal came before there was a child
    # A signal ends `wait` early; only the last one gives the child's own code.
    while kill -0 "$child" 2>/dev/null; do wait "$child"; done
    wait "$child"
    code=$?
    child=''
    [[ -n $killer ]] && kill "$killer" 2>/dev/null
}

# Waits some milliseconds, but no longer once a signal has come.
pause() {
    sleep "$(to_seconds "$1")" >/dev/null 2>&1 &
    wait "$!"
    [[ -n $stopping ]] && kill "$!" 2>/dev/null
}

add_resume() {
    local word
    for word in "${command[@]}"; do [[ $word == --resume ]] && return; done
    command+=(--resume)
}

# Ends the supervisor where the exit code says so.
stop_if_over() {
    case $code in
        0)
            say "done"
            exit 0
            ;;
        "$WRONG_INPUT")
            say "wrong input: mend the command; what is wrong stands above"
            exit "$WRONG_INPUT"
            ;;
        "$ALARMED")
            say "the run's alarm stopped it: what it saw stands above, and --resume goes on all the same"
            exit "$ALARMED"
            ;;
    esac
    [[ -n $stopping ]] || return
    if ((code == PREEMPTED)); then
        say "the checkpoint is saved: start again with --resume"
    else
        say "exit code $code before it had saved: the last checkpoint of the run's folder is what remains"
    fi
    exit "$code"
}

supervise() {
    local code began took pause_ms failures=0
    local -r first_ms=$(to_ms "${FLOWRL_PAUSE_SECONDS:-10}") max_ms=$(to_ms "${FLOWRL_PAUSE_MAX:-600}")
    local -r quick_ms=$(to_ms "$QUICK")
    pause_ms=$first_ms
    while :; do
        began=$(now_ms)
        run_once "${command[@]}"
        took=$(($(now_ms) - began))
        stop_if_over
        if ((took >= quick_ms)); then
            failures=0 pause_ms=$first_ms
        elif ((code != PREEMPTED)) && ((++failures >= QUICK_FAILURES)); then
            say "$failures crashes in a row, each within $QUICK s, the last with exit code $code:" \
                "given up; the reason stands above"
            exit "$code"
        fi
        ((pause_ms > max_ms)) && pause_ms=$max_ms
        add_resume
        say "exit code $code after $((took / 1000)) s: again with --resume in $(to_seconds "$pause_ms") s"
        pause "$pause_ms"
        if [[ -n $stopping ]]; then
            say "stopped between two runs"
            exit "$PREEMPTED"
        fi
        pause_ms=$((pause_ms * 2))
    done
}

case ${1-} in
    '' | -h | --help | help)
        sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"
        [[ -n ${1-} ]]
        exit $(($? * WRONG_INPUT))
        ;;
esac
command=("$@")
trap pass_on TERM INT USR1
supervise
