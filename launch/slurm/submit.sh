#!/usr/bin/env bash
# A run on GPU nodes under Slurm, from a clone on storage that all nodes see, after
# `make venv ACCELERATOR=cuda`.
#
#     launch/slurm/submit.sh --SETTING=VALUE ... [--settings=FILE] [--dry-run] [-- ARGUMENTS...]
#
# submits launch/slurm/train.sbatch, which runs `python -m flowrl_jax.train ARGUMENTS`. Ten minutes
# before the time limit (or --warning), and when Slurm preempts the job, it saves a checkpoint and goes
# back to the queue, to go on from there.
#
# Settings, as flags or as lines NAME=VALUE of a file:
#
#     --name --nodes --gpus-per-node --time   of the job; --time as Slurm writes it, such as 24:00:00
#     --workdir         folder of the run, on storage that all nodes see
#     --processes       gpu (one process a GPU, the default) or node (one process a node)
#     --partition --account --qos             where your cluster asks for them
#     --cpus-per-task --mem                   likewise
#     --warning         seconds before the time limit; default 600
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
readonly HERE
# shellcheck source=../common.sh
source "$HERE/../common.sh"

SETTINGS=(NAME NODES GPUS_PER_NODE TIME WORKDIR PROCESSES=gpu PARTITION ACCOUNT QOS CPUS_PER_TASK MEM
    WARNING=600)
SWITCHES=(help)
read_arguments "$@"
if [[ -n $HELP || ${words[0]-} == help || $# == 0 ]]; then
    help_of "${BASH_SOURCE[0]}"
    exit
fi
((${#words[@]} == 0)) || fail "$WRONG_INPUT" "${words[0]}: the run's flags stand after --"
require NAME NODES GPUS_PER_NODE TIME WORKDIR
check NODES '[1-9][0-9]*' "a number from 1 on"
check GPUS_PER_NODE '[1-9][0-9]*' "a number from 1 on"
check PROCESSES 'gpu|node' "gpu or node"
check WARNING '[1-9][0-9]*' "seconds"
((${#passed[@]})) || fail "$WRONG_INPUT" "what to train is missing: give it after --, as in -- --config=configs/math_7b.py"
refuse_passed --workdir --resume
need sbatch "this is for a login node of a Slurm cluster"

options=(--job-name="$NAME" --nodes="$NODES" --gpus-per-node="$GPUS_PER_NODE" --time="$TIME"
    --signal="B:USR1@$WARNING" --export="ALL,FLOWRL_PROCESSES=$PROCESSES")
tasks=$GPUS_PER_NODE
[[ $PROCESSES == gpu ]] || tasks=1
options+=(--ntasks-per-node="$tasks" --output="$NAME-%j.log")
for setting in PARTITION ACCOUNT QOS CPUS_PER_TASK MEM; do
    [[ -z ${!setting} ]] || options+=("$(_flag "$setting")=${!setting}")
done
cd "${HERE%/launch/slurm}"
run sbatch "${options[@]}" launch/slurm/train.sbatch --workdir="$WORKDIR" "${passed[@]}"
