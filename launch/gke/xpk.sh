#!/usr/bin/env bash
# A run through XPK, on a cluster that XPK has made; `pip install xpk` brings it.
#
#     launch/gke/xpk.sh --settings=FILE [--SETTING=VALUE ...] [--dry-run] [-- ARGUMENTS...]
#
# Settings, as flags or as lines NAME=VALUE of a file:
#
#     --project --zone --cluster   where the cluster is
#     --name                       of the run, yours to choose
#     --image                      holding this commit, see launch/gke/Dockerfile
#     --tpu-type                   such as v6e-16
#     --workdir                    the run's folder in the pods, on storage that all of them see
#     --slices                     default 1
#     --max-restarts               of the whole run after lost pods; default 100
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
readonly HERE
# shellcheck source=../common.sh
source "$HERE/../common.sh"

SETTINGS=(PROJECT ZONE CLUSTER NAME IMAGE TPU_TYPE WORKDIR SLICES=1 MAX_RESTARTS=100)
SWITCHES=(help)
read_arguments "$@"
if [[ -n $HELP || ${words[0]-} == help || $# == 0 ]]; then
    help_of "${BASH_SOURCE[0]}"
    exit
fi
((${#words[@]} == 0)) || fail "$WRONG_INPUT" "${words[0]}: the run's flags stand after --"
require PROJECT ZONE CLUSTER NAME IMAGE TPU_TYPE WORKDIR
((${#passed[@]})) || fail "$WRONG_INPUT" "what to train is missing: give it after --, as in -- --config=configs/math_7b.py"
refuse_passed --workdir --resume
need xpk "pip install xpk"
run xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$NAME" \
    --docker-image="$IMAGE" --tpu-type="$TPU_TYPE" --num-slices="$SLICES" --max-restarts="$MAX_RESTARTS" \
    --command="cd /flowrl_jax && $(typed launch/supervise.sh .venv/bin/python -u -m flowrl_jax.train \
        --workdir="$WORKDIR" --resume "${passed[@]}")"
