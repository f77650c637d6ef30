#!/usr/bin/env bash
# A run on TPU nodes of a GKE cluster that has JobSet installed; kubectl must point to it.
#
#     launch/gke/submit.sh COMMAND --settings=FILE [--SETTING=VALUE ...] [--dry-run] [-- ARGUMENTS...]
#
#     render   prints the manifest of `python -m flowrl_jax.train ARGUMENTS`
#     check    has the cluster check it (kubectl apply --dry-run=server); nothing is started
#     apply    starts the run, or leaves it alone where it runs with this very manifest
#     status   of the run and its pods
#     logs     follows what process 0 writes
#     delete   ends the run: its pods have two minutes to save a checkpoint
#     help     this text
#
# --dry-run prints the commands and the manifest, and runs nothing.
#
# Settings, as flags or as lines NAME=VALUE of a file:
#
#     --name             of the run, yours to choose
#     --image            holding this commit, see launch/gke/Dockerfile
#     --accelerator      tpu-v6e-slice, tpu-v5p-slice, tpu-v5-lite-podslice or tpu-v4-podslice
#     --topology         of a slice, such as 4x4
#     --chips            of one host, such as 4
#     --bucket           Cloud Storage bucket for runs and compiled programs, mounted in every pod
#     --service-account  of Kubernetes, which may write the bucket
#     --capacity         spot or on-demand (whatever the node pool is)
#     --slices           default 1
#     --max-restarts     of the whole run after lost pods; default 100
#     --namespace        default `default`
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
readonly HERE
# shellcheck source=../common.sh
source "$HERE/../common.sh"

SETTINGS=(NAME IMAGE ACCELERATOR TOPOLOGY CHIPS BUCKET SERVICE_ACCOUNT CAPACITY
    SLICES=1 MAX_RESTARTS=100 NAMESPACE=default)
SWITCHES=()

# A text in double quotes, as YAML and JSON read it.
quote() {
    local text=${1//\\/\\\\}
    text=${text//\"/\\\"}
    text=${text//$'\n'/\\n}
    printf '"%s"' "${text//$'\t'/\\t}"
}

# Leaves the number of hosts of a slice in `hosts`.
count_hosts() {
    local chips=1 side
    for side in ${TOPOLOGY//x/ }; do ((chips *= side)); done
    ((chips % CHIPS == 0)) ||
        fail "$WRONG_INPUT" "--topology=$TOPOLOGY has $chips chips, which --chips=$CHIPS a host do not divide"
    hosts=$((chips / CHIPS))
}

# The template with its {{NAME}}s filled in.
render() {
    require NAME IMAGE ACCELERATOR TOPOLOGY CHIPS BUCKET SERVICE_ACCOUNT CAPACITY
    ((${#passed[@]})) || fail "$WRONG_INPUT" "what to train is missing: give it after --, as in -- --config=configs/math_7b.py"
    refuse_passed --workdir --resume
    local manifest word name hosts spot='' arguments=''
    count_hosts
    [[ $CAPACITY == on-demand ]] || spot=$'\n                cloud.google.com/gke-spot: "true"'
    for word in "${passed[@]}"; do arguments+=$'\n                    - '$(quote "$word"); done
    manifest=$(<"$HERE/jobset.yaml")
    manifest=${manifest//"{{HOSTS}}"/$hosts}
    for name in NAME NAMESPACE SLICES MAX_RESTARTS CHIPS; do
        manifest=${manifest//"{{$name}}"/"${!name}"}
    done
    for name in IMAGE ACCELERATOR TOPOLOGY BUCKET SERVICE_ACCOUNT; do
        manifest=${manifest//"{{$name}}"/"$(quote "${!name}")"}
    done
    manifest=${manifest//"{{SPOT}}"/"$spot"}
    printf '%s\n' "${manifest//"{{ARGUMENTS}}"/"$arguments"}"
}

apply() {
    local manifest
    manifest=$(render) || exit # its line has been said
    run kubectl apply --filename=- "$@" <<<"$manifest"
    [[ -z $DRY_RUN ]] || printf '%s\n' "$manifest"
}

kubectl_here() { run kubectl --namespace="$NAMESPACE" "$@"; }

cmd_render() { render; }
cmd_check() { apply --dry-run=server; }

cmd_apply() {
    apply || fail "$FAULT" "the cluster refuses the manifest, see above: is JobSet installed, and was $NAME deleted before it changed?"
    say "$NAME: \`logs\` follows it"
}

cmd_status() {
    require NAME
    kubectl_here get jobset "$NAME" && kubectl_here get pods --selector="jobset.sigs.k8s.io/jobset-name=$NAME" --output=wide
}

cmd_logs() {
    require NAME
    kubectl_here logs --follow --tail=100 \
        --selector="jobset.sigs.k8s.io/jobset-name=$NAME,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
}

cmd_delete() {
    require NAME
    kubectl_here delete jobset "$NAME" --ignore-not-found
}

main() {
    read_arguments "$@"
    local -r command=${words[0]:-help}
    if [[ $command == help ]]; then
        help_of "${BASH_SOURCE[0]}"
        return
    fi
    declare -F "cmd_$command" >/dev/null || fail "$WRONG_INPUT" "$command is no command: see \`submit.sh help\`"
    # Pods are called NAME-slice-0-0-xxxxx, in 63 characters.
    check NAME '[a-z]([a-z0-9-]{0,38}[a-z0-9])?' "up to 40 lower-case letters, digits and -, beginning with a letter"
    check NAMESPACE '[a-z0-9]([a-z0-9-]*[a-z0-9])?' "lower-case letters, digits and -"
    check TOPOLOGY '[0-9]+x[0-9]+(x[0-9]+)?' "chips along each side, such as 4x4 or 2x2x4"
    check CHIPS '[1-9][0-9]*' "a number from 1 on"
    check SLICES '[1-9][0-9]*' "a number from 1 on"
    check MAX_RESTARTS '[0-9]+' "a number"
    check CAPACITY 'spot|on-demand' "spot or on-demand"
    [[ $command == render ]] || need kubectl "install it, then \`gcloud container clusters get-credentials\`"
    "cmd_$command"
}

main "$@"
