#!/usr/bin/env bash
# A run on Cloud TPU VMs, from the request for machines to the fetched results.
#
#     launch/tpu/pod.sh COMMAND --settings=FILE [--SETTING=VALUE ...] [--dry-run] [-- ARGUMENTS...]
#
#     create   asks for the slice in Google's queue, and waits until it is ACTIVE
#     install  copies this commit to every worker and installs it there
#     run      starts `python -m flowrl_jax.train ARGUMENTS` on every worker, supervised, in the background
#     up       create, install and run; --watch stays, and does it again whenever Google took a
#              spot slice away, until the run is done
#     logs     shows what the run writes, and follows it; --worker=N looks at another worker than 0
#     status   state of the slice, and of the run on every worker
#     stop     ends the run on every worker, once a checkpoint is saved
#     exec     runs `ARGUMENTS` in the installed commit on every worker (--worker=N: on that one)
#     fetch    copies the run's folder here, to runs/RUN; --checkpoints brings those as well
#     delete   gives the slice back
#     help     this text
#
# Every command asks what is there and goes on from there: what was cut short is done by doing it again.
# --dry-run prints each command that would be run from nothing, and runs none.
#
# Settings, as flags or as lines NAME=VALUE of a file (launch/tpu/settings.example):
#
#     --project            the Google Cloud project that pays
#     --zone               of the TPUs; `gcloud compute tpus locations list`
#     --name               of the slice, yours to choose
#     --accelerator-type   such as v6e-8; `gcloud compute tpus accelerator-types list --zone=ZONE`
#     --runtime-version    the workers' image: v2-alpha-tpuv6e, v2-alpha-tpuv5 (v5p),
#                          v2-alpha-tpuv5-lite (v5e) or tpu-ubuntu2204-base (v4 and older)
#     --capacity           spot, reserved or on-demand
#     --run                name of the run; its folder on the workers is runs/RUN
#     --bucket             Cloud Storage bucket that holds runs and compiled programs, mounted on every
#                          worker; needed with more than one worker, and for runs to outlive a slice
#     --slices             how many slices of that type; default 1
#     --poll               seconds between two looks at the queue; default 30
#     --to                 folder that fetch writes; default runs/RUN
#     --worker             of logs and exec
#
# Switches: --recreate (create deletes a failed or preempted request first), --watch, --checkpoints,
# --no-follow (logs ends after the last lines).
#
# Exit codes: 0 done, 1 Google Cloud or a worker failed, 2 wrong input, 75 preempted.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
readonly HERE REPOSITORY=${HERE%/launch/tpu}
# shellcheck source=../common.sh
source "$HERE/../common.sh"

SETTINGS=(PROJECT ZONE NAME ACCELERATOR_TYPE RUNTIME_VERSION CAPACITY RUN BUCKET SLICES=1 POLL=30 TO WORKER)
SWITCHES=(recreate watch checkpoints no-follow)

# On the workers, below the home folder; launch/tpu/worker.sh knows the rest.
readonly REMOTE=flowrl_jax

# --- Google Cloud -----------------------------------------------------------------------------

# One line for what gcloud complained about, with the remedy.
explain() {
    local text line
    text=$(<"$complaints")
    line=$(grep -m 1 -E 'ERROR|rror:' "$complaints" || head -n 1 "$complaints")
    line=$(printf '%s' "${line#ERROR: }" | cut -c 1-300)
    case $text in
        *"o more capacity"* | *stockout* | *STOCKOUT*)
            fail "$FAULT" "$ZONE has no free $ACCELERATOR_TYPE now: try again later, another --zone, or --capacity=spot ($line)" ;;
        *RESOURCE_EXHAUSTED* | *[Qq]uota*)
            fail "$FAULT" "project $PROJECT has not the quota for ${CAPACITY:-this} $ACCELERATOR_TYPE in $ZONE: ask for it at https://console.cloud.google.com/iam-admin/quotas?project=$PROJECT, or take another zone or size ($line)" ;;
        *"active account"* | *[Rr]eauth* | *"auth login"*)
            fail "$FAULT" "gcloud is not signed in: run \`gcloud auth login\` ($line)" ;;
        *SERVICE_DISABLED* | *"has not been used in project"*)
            fail "$FAULT" "the TPU service is off in $PROJECT: run \`gcloud services enable tpu.googleapis.com --project=$PROJECT\` ($line)" ;;
        *PERMISSION_DENIED* | *"ermission denied"* | *"does not have permission"*)
            fail "$FAULT" "this account may not do that in $PROJECT: have somebody grant it roles/tpu.admin and roles/iam.serviceAccountUser ($line)" ;;
        *INVALID_ARGUMENT* | *"nvalid value"* | *"nvalid choice"*)
            fail "$FAULT" "Google Cloud refuses a setting: compare with \`gcloud compute tpus accelerator-types list --zone=$ZONE\` and \`gcloud compute tpus versions list --zone=$ZONE\` ($line)" ;;
        *) fail "$FAULT" "gcloud failed: $line" ;;
    esac
}

# ask COMMAND...: runs gcloud; its output is in `reply`, empty where the thing does not exist.
# Returns 1 where another try is all it needs.
ask() {
    reply=''
    if [[ -n $DRY_RUN ]]; then
        run gcloud "$@"
        return
    fi
    reply=$(gcloud "$@" 2>"$complaints") && return
    if [[ $* == *" queued-resources create "* ]]; then
        grep -q ALREADY_EXISTS "$complaints" && return
    else
        grep -qE 'NOT_FOUND|not found' "$complaints" && return
    fi
    grep -qE 'UNAVAILABLE|DEADLINE_EXCEEDED|timed out|Connection|HTTPError 5' "$complaints" && return 1
    explain
}

queued_resource() {
    local -r verb=$1
    shift
    ask compute tpus queued-resources "$verb" "$NAME" --project="$PROJECT" --zone="$ZONE" "$@"
}

# The state of the request is in `state`; empty where there is none.
observe() {
    queued_resource describe --format='value(state.state)' || return
    state=$reply
}

observe_surely() {
    observe || fail "$FAULT" "Google Cloud does not answer: try again ($(head -n 1 "$complaints"))"
}

# Names of the slices' TPUs.
nodes() {
    local i
    if ((SLICES == 1)); then
        printf '%s\n' "$NAME"
    else
        for ((i = 0; i < SLICES; ++i)); do printf '%s\n' "$NAME-$i"; done
    fi
}

# remote WORKER COMMAND...: runs a command on a worker of the first slice, or on `all` of all slices, at
# the same time: a program that waits for its others must not keep them from starting.
remote() {
    local -r worker=$1
    local node failed=0 started=()
    shift
    for node in $(nodes); do
        run gcloud compute tpus tpu-vm ssh "$node" --project="$PROJECT" --zone="$ZONE" \
            --worker="$worker" --command="$(typed "$@")" &
        started+=("$!")
        [[ -z $DRY_RUN ]] || wait "$!" # in order
        [[ $worker == all ]] || break
    done
    for node in "${started[@]}"; do wait "$node" || failed=1; done
    return "$failed"
}

copy_to_all() {
    local node
    for node in $(nodes); do
        run gcloud compute tpus tpu-vm scp "$1" "$node:$2" --project="$PROJECT" --zone="$ZONE" \
            --worker=all || return
    done
}

# on_worker WORKER COMMAND...: a command of worker.sh, of the commit that was installed last.
on_worker() {
    local -r worker=$1
    shift
    remote "$worker" bash "$REMOTE/current/launch/tpu/worker.sh" "$@"
}

# --- create -----------------------------------------------------------------------------------

meaning() {
    case $1 in
        '') printf 'nobody has asked for it' ;;
        ACCEPTED | CREATING | WAITING_FOR_RESOURCES) printf 'in the queue, for as long as others hold the chips; Ctrl-C leaves it there' ;;
        PROVISIONING) printf 'chips were found, the workers boot' ;;
        ACTIVE) printf 'yours, and paid for until you delete it' ;;
        FAILED) printf 'Google Cloud gave it up' ;;
        SUSPENDING | SUSPENDED) printf 'preempted: the workers and their disks are gone' ;;
        DELETING) printf 'being deleted' ;;
        *) printf 'a state that this script does not know' ;;
    esac
}

ask_for_slice() {
    local options=(--accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION")
    if ((SLICES == 1)); then
        options+=(--node-id="$NAME")
    else
        options+=(--node-count="$SLICES" --node-prefix="$NAME")
    fi
    [[ $CAPACITY == on-demand ]] || options+=("--$CAPACITY")
    say "$NAME: asking for $SLICES x $ACCELERATOR_TYPE ($CAPACITY) in $ZONE"
    # A request that arrived although the answer did not is found by the next look at the state.
    queued_resource create "${options[@]}" || true
}

delete_request() {
    # --force deletes the TPUs of the request with it.
    queued_resource delete --force --quiet || fail "$FAULT" "Google Cloud does not answer: try again"
}

# Ends where waiting is of no use. `recreated` keeps it from asking anew for ever.
handle_lost() {
    if [[ $state == SUSPENDING && -n $RECREATE ]]; then
        return # it can be deleted once it is SUSPENDED
    elif [[ -n $RECREATE && (-z $recreated || ($state == SUSPENDED && -n $WATCH)) ]]; then
        recreated=1
        delete_request
        ask_for_slice
    elif [[ $state == FAILED ]]; then
        queued_resource describe --format='value(state.failedData.error.message)' || true
        printf 'ERROR: %s\n' "${reply:-no reason given}" >"$complaints"
        [[ $reply != *[Qq]uota* ]] || explain
        fail "$FAULT" "$NAME has failed (${reply:-no reason given}): mend the cause, then \`create --recreate\` deletes the request and asks anew"
    else
        fail "$PREEMPTED" "$NAME was preempted, its workers and their disks are gone: \`create --recreate\` deletes the request and asks anew, \`up\` also starts the run again"
    fi
}

cmd_create() {
    require PROJECT ZONE NAME ACCELERATOR_TYPE RUNTIME_VERSION CAPACITY
    local shown='' recreated='' asked=''
    while :; do
        observe || {
            sleep "$POLL"
            continue
        }
        [[ "$state" == "$shown" ]] || say "$NAME: $state ($(meaning "$state"))"
        shown=$state
        case $state in
            ACTIVE) return ;;
            FAILED | SUSPENDING | SUSPENDED) handle_lost ;;
            '')
                [[ -z $asked ]] || fail "$FAULT" "$NAME is gone from the queue: somebody deleted it, or it was never accepted; create it again"
                ask_for_slice
                asked=1
                if [[ -n $DRY_RUN ]]; then
                    observe
                    return
                fi
                continue
                ;;
        esac
        sleep "$POLL"
    done
}

require_active() {
    require PROJECT ZONE NAME
    observe_surely
    [[ -n $DRY_RUN || $state == ACTIVE ]] ||
        fail "$FAULT" "$NAME is not there (${state:-no request}: $(meaning "$state")): \`create\` it first"
}

# --- install ----------------------------------------------------------------------------------

commit() { git -C "$REPOSITORY" rev-parse --short=12 HEAD; }

# Makes a folder on every worker: proof that all of them answer, which takes them a minute after boot.
reach_workers() {
    local tries
    for ((tries = 1; tries < 10; ++tries)); do
        remote all mkdir -p "$1" && return
        say "$NAME: not every worker answers yet"
        sleep "$POLL"
    done
    fail "$FAULT" "$NAME: a worker cannot be reached, see above: does a firewall rule let ssh through (tcp:22), and is \`gcloud compute tpus tpu-vm ssh $NAME\` all right?"
}

cmd_install() {
    require_active
    local id archive changed
    id=$(commit) || fail "$WRONG_INPUT" "$REPOSITORY is no clone: what is installed is a commit"
    changed=$(git -C "$REPOSITORY" status --porcelain --untracked-files=no | wc -l)
    ((changed == 0)) || say "note: $changed changed files are not part of commit $id and stay here"
    archive=$scratch/$id.tar.gz
    run git -C "$REPOSITORY" archive --format=tar.gz --output="$archive" HEAD
    say "$NAME: commit $id to every worker"
    reach_workers "$REMOTE/$id"
    copy_to_all "$archive" "$REMOTE/$id.tar.gz" || fail "$FAULT" "$NAME: copying failed, see above: install again goes on from here"
    remote all tar -xzf "$REMOTE/$id.tar.gz" -C "$REMOTE/$id" || fail "$FAULT" "$NAME: unpacking failed, see above: install again"
    remote all bash "$REMOTE/$id/launch/tpu/worker.sh" install "$BUCKET" ||
        fail "$FAULT" "$NAME: a worker could not install, see above: install again goes on from here"
    say "$NAME: installed"
}

# --- run --------------------------------------------------------------------------------------

check_run() {
    require PROJECT ZONE NAME RUN
    ((${#passed[@]})) || fail "$WRONG_INPUT" "what to train is missing: give it after --, as in -- --config=configs/math_7b.py"
    refuse_passed --workdir --resume
    local word file
    for word in "${passed[@]}"; do
        [[ $word == --config=* ]] || continue
        file=${word#--config=} file=${file%%:*}
        git -C "$REPOSITORY" cat-file -e "HEAD:$file" 2>/dev/null ||
            fail "$WRONG_INPUT" "--config=$file is not in commit $(commit): commit it, then \`install\`"
    done
}

# Checkpoints of several hosts are one folder, which all of them must see.
check_storage() {
    [[ -z $BUCKET ]] || return 0
    ask compute tpus tpu-vm describe "$(nodes | head -n 1)" --project="$PROJECT" --zone="$ZONE" \
        --format='value(networkEndpoints[].ipAddress)' || true
    local -r addresses=${reply//[^;,]/}
    ((SLICES == 1 && ${#addresses} == 0)) ||
        fail "$WRONG_INPUT" "$NAME has more than one worker and their checkpoints need a folder that all see: give --bucket=NAME, then \`install\` again"
}

cmd_run() {
    check_run
    require_active
    check_storage
    local -r id=$(commit)
    remote all bash "$REMOTE/$id/launch/tpu/worker.sh" start "$RUN" "$BUCKET" "${passed[@]}" ||
        fail "$FAULT" "$NAME: the run did not start everywhere, see above: \`install\` commit $id if it is not there yet, then \`run\` again"
    say "$NAME: $RUN runs; \`logs\` follows it"
}

cmd_up() {
    check_run
    RECREATE=1
    cmd_create
    cmd_install
    cmd_run
    [[ -z $WATCH || -n $DRY_RUN ]] || watch
}

# Until the run has ended: looks, and starts anew what Google took away.
watch() {
    local answer unreachable=0 # times in a row
    while :; do
        sleep "$POLL"
        observe || continue
        if [[ $state != ACTIVE ]]; then
            say "$NAME: ${state:-gone} ($(meaning "$state")): asking anew"
            cmd_create
            cmd_install
            cmd_run
            continue
        fi
        if answer=$(on_worker 0 exit-code 2>"$complaints"); then
            unreachable=0
        elif ((++unreachable >= 10)); then
            fail "$FAULT" "$NAME is ACTIVE, but worker 0 cannot be reached: $(tail -n 1 "$complaints")"
        else
            continue
        fi
        case ${answer##*$'\n'} in
            running) ;;
            0)
                say "$RUN is done: \`fetch\` its results, then \`delete\` the slice, which costs until then"
                return
                ;;
            75 | unknown) # the workers were started anew
                say "$RUN was cut short: starting it again"
                cmd_run
                ;;
            stopped)
                say "$RUN was stopped: \`run\` goes on with it; the slice is still there and costs"
                return "$PREEMPTED"
                ;;
            *) fail "$FAULT" "$RUN has ended with exit code ${answer##*$'\n'}: see \`logs\`; the slice is still there and costs" ;;
        esac
    done
}

# --- the rest ---------------------------------------------------------------------------------

cmd_logs() {
    require PROJECT ZONE NAME
    on_worker "${WORKER:-0}" log "${NO_FOLLOW:-follow}"
}

cmd_status() {
    require PROJECT ZONE NAME
    observe_surely
    say "$NAME: ${state:-absent} ($(meaning "$state"))"
    [[ $state == ACTIVE || -n $DRY_RUN ]] || return 0
    on_worker all status || say "$NAME: not every worker answers, or nothing is installed yet"
}

cmd_stop() {
    require_active
    on_worker all stop || fail "$FAULT" "$NAME: not every worker has stopped, see above"
}

cmd_exec() {
    ((${#passed[@]})) || fail "$WRONG_INPUT" "a command is missing: give it after --"
    require_active
    on_worker "${WORKER:-all}" exec "$BUCKET" "${passed[@]}"
}

cmd_fetch() {
    require PROJECT RUN
    local -r to=${TO:-runs/$RUN}
    run mkdir -p "$to"
    if [[ -n $BUCKET ]]; then
        local options=(--recursive)
        [[ -n $CHECKPOINTS ]] || options+=(--exclude='^checkpoints/.*')
        run gcloud storage rsync "${options[@]}" "gs://$BUCKET/runs/$RUN" "$to" --project="$PROJECT" ||
            fail "$FAULT" "gs://$BUCKET/runs/$RUN could not be copied, see above: has the run begun?"
    else
        require_active
        local -r archive=$scratch/$RUN.tar.gz
        on_worker 0 pack "$RUN" "${CHECKPOINTS:+checkpoints}" || fail "$FAULT" "worker 0 has no run $RUN, see above"
        run gcloud compute tpus tpu-vm scp "$NAME:$REMOTE/$RUN.tar.gz" "$archive" \
            --project="$PROJECT" --zone="$ZONE" --worker=0 || fail "$FAULT" "copying failed, see above: fetch again"
        run tar -xzf "$archive" -C "$to"
    fi
    say "$to: fetched; \`python -m flowrl_jax.report --workdir=$to\` makes a page of it"
}

cmd_delete() {
    require PROJECT ZONE NAME
    observe_surely
    if [[ -z $DRY_RUN && (-z $state || $state == DELETING) ]]; then
        say "$NAME: ${state:-already gone}"
        return
    fi
    [[ -n $BUCKET ]] || say "$NAME: what its disks hold goes with it"
    delete_request
    say "$NAME: deleted"
}

main() {
    read_arguments "$@"
    local -r command=${words[0]:-help}
    ((${#words[@]} < 2)) || fail "$WRONG_INPUT" "${words[1]}: one command at a time; the run's flags stand after --"
    if [[ $command == help ]]; then
        help_of "${BASH_SOURCE[0]}"
        return
    fi
    declare -F "cmd_$command" >/dev/null || fail "$WRONG_INPUT" "$command is no command: see \`pod.sh help\`"
    check NAME '[a-z]([a-z0-9-]*[a-z0-9])?' "lower-case letters, digits and -, beginning with a letter"
    check RUN '[A-Za-z0-9][A-Za-z0-9._-]*' "letters, digits, . _ and -"
    check BUCKET '[a-z0-9][a-z0-9._-]*' "the bucket's bare name, without gs:// and without a folder"
    check CAPACITY 'spot|reserved|on-demand' "spot, reserved or on-demand"
    check SLICES '[1-9][0-9]*' "a number from 1 on"
    check POLL '[0-9]*\.?[0-9]+' "seconds"
    check WORKER 'all|[0-9]+' "a worker's number, or all"
    need gcloud "install it from https://cloud.google.com/sdk/docs/install, then \`gcloud auth login\`"
    scratch=$(mktemp -d)
    complaints=$scratch/complaints
    : >"$complaints"
    trap 'rm -rf "$scratch"' EXIT
    state='' reply=''
    "cmd_$command"
}

main "$@"
