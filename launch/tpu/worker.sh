#!/usr/bin/env bash
# What launch/tpu/pod.sh does on one worker of a TPU slice. It lies in the installed commit:
#
#     ~/flowrl_jax/COMMIT/   the clone, with its .venv      ~/flowrl_jax/current -> COMMIT
#     ~/flowrl_jax/storage/  runs/ and cache/; the bucket, where there is one
#     ~/flowrl_jax/run.*     of the run: its name, log, process and exit code
set -euo pipefail

CODE=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
readonly CODE BASE=${CODE%/*}
readonly STORAGE=$BASE/storage
readonly PYTHON_VERSION=3.12 # what uv fetches where the image's own is too old
WHO=$(hostname)
readonly WHO

say() { printf '%s: %s\n' "$WHO" "$*"; }
# Whoever asked says in the end that it failed, and what to do; this is why.
fail() {
    printf '%s: %s\n' "$WHO" "$*" >&2
    exit 1
}

# --- install ----------------------------------------------------------------------------------

# A fresh image updates itself in the background and holds apt's lock meanwhile.
apt_install() {
    sudo apt-get -o DPkg::Lock::Timeout=600 -qq update && sudo apt-get -o DPkg::Lock::Timeout=600 -qq install -y "$@"
}

can_make_venv() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_uv() { PATH=$PATH:$HOME/.local/bin command -v uv; }

install_uv() {
    local pin
    pin=$(sed -n 's/^UV = "\(.*\)"$/\1/p' "$CODE/scripts/bootstrap.py") # one pin for all of us
    python3 -m pip install --user --quiet "$pin" 2>/dev/null ||
        curl -LsSf "https://astral.sh/uv/${pin#uv==}/install.sh" | sh
}

# Prints an interpreter that is new enough. Images for v4 to v6e come with 3.8 or 3.10.
find_python() {
    local candidate uv
    for candidate in python3.13 python3.12 python3.11 python3; do
        if can_make_venv "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    uv=$(find_uv) || { install_uv >&2 && uv=$(find_uv); } ||
        fail "Python is older than 3.11 here and uv, which brings another, cannot be installed: see above"
    "$uv" python install --quiet "$PYTHON_VERSION" >&2 || fail "uv cannot fetch Python $PYTHON_VERSION: see above"
    "$uv" python find "$PYTHON_VERSION"
}

install_gcsfuse() {
    local -r key=/usr/share/keyrings/cloud.google.gpg
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo gpg --batch --yes --dearmor -o "$key"
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    apt_install gcsfuse
}

# Runs and compiled programs lie in the bucket, where there is one.
mount_storage() {
    local -r bucket=$1
    mkdir -p "$STORAGE"
    if [[ -z $bucket ]] || mountpoint -q "$STORAGE"; then return; fi
    command -v gcsfuse >/dev/null || install_gcsfuse || fail "gcsfuse cannot be installed: see above"
    # Hosts read what others have just written: nothing about files may be remembered. Checkpoints are
    # folders that get their name when they are complete, hence renames.
    gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
        --rename-dir-limit=100000 "$bucket" "$STORAGE" >/dev/null ||
        fail "gs://$bucket cannot be mounted: does it exist, and may the workers' service account write it (roles/storage.objectAdmin)?"
}

cmd_install() {
    local python
    if [[ ! -e $CODE/.venv/.installed-tpu ]]; then
        command -v make >/dev/null || apt_install make || fail "make cannot be installed: see above"
        python=$(find_python)
        say "installing with $python"
        make -C "$CODE" --no-print-directory venv ACCELERATOR=tpu PYTHON="$python" || fail "make venv failed: see above"
    fi
    mount_storage "${1-}"
    ln -sfn "$CODE" "$BASE/current"
    say "has ${CODE##*/}"
}

# --- run --------------------------------------------------------------------------------------

# A number alone may be another process's by now, if the worker has booted since.
is_running() {
    [[ -s $BASE/run.pid ]] && grep -qas supervise.sh "/proc/$(<"$BASE/run.pid")/cmdline"
}

run_name() { cat "$BASE/run.name" 2>/dev/null || true; }

prepare() {
    mount_storage "$1"
    mkdir -p "$STORAGE/runs" "$STORAGE/cache/jax"
    export JAX_COMPILATION_CACHE_DIR=$STORAGE/cache/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5
    export PATH=$CODE/.venv/bin:$PATH
    cd "$CODE"
}

# Google warns 30 s before it takes a spot slice away.
supervised() {
    local supervisor
    FLOWRL_GRACE_SECONDS=${FLOWRL_GRACE_SECONDS:-28} "$CODE/launch/supervise.sh" "$@" &
    supervisor=$!
    printf '%s\n' "$supervisor" >"$BASE/run.pid"
    trap '' TERM INT HUP # the supervisor gets them as well, and its exit code is to be kept
    local code=0
    wait "$supervisor" || code=$?
    printf '%s\n' "$code" >"$BASE/run.exit"
}

cmd_start() {
    local -r run=$1 bucket=$2
    shift 2
    [[ -x $CODE/.venv/bin/python ]] || fail "${CODE##*/} is not installed: pod.sh install"
    if is_running; then
        [[ $(run_name) == "$run" ]] || fail "$(run_name) runs here: pod.sh stop ends it"
        say "$run is already running"
        return
    fi
    prepare "$bucket"
    rm -f "$BASE"/run.{exit,pid,stopped}
    printf '%s\n' "$run" >"$BASE/run.name"
    # With --resume from the start: a new folder begins from the beginning, another one goes on.
    setsid bash "$CODE/launch/tpu/worker.sh" supervised "$CODE/.venv/bin/python" -u -m flowrl_jax.train \
        --workdir="$STORAGE/runs/$run" --resume "$@" </dev/null >>"$BASE/run.log" 2>&1 &
    local i
    for ((i = 0; i < 50; ++i)); do
        [[ -s $BASE/run.pid ]] && break
        sleep 0.1
    done
    [[ -s $BASE/run.pid ]] || fail "the supervisor did not start: see $BASE/run.log"
    say "$run has started"
}

cmd_stop() {
    if ! is_running; then
        say "no run"
        return
    fi
    : >"$BASE/run.stopped"
    kill -TERM "$(<"$BASE/run.pid")"
    local i
    for ((i = 0; i < 1200; ++i)); do
        is_running || break
        sleep 0.1
    done
    is_running && fail "$(run_name) has not ended within two minutes: see its log"
    say "$(run_name) has stopped"
}

cmd_exit_code() {
    if is_running; then
        echo running
    elif [[ -e $BASE/run.stopped ]]; then
        echo stopped
    else
        cat "$BASE/run.exit" 2>/dev/null || echo unknown
    fi
}

cmd_status() {
    local -r name=$(run_name)
    if [[ -z $name ]]; then
        say "no run yet"
    elif is_running; then
        say "$name is running | $(tail -n 1 "$BASE/run.log")"
    else
        say "$name has ended, exit code $(cmd_exit_code) | $(tail -n 1 "$BASE/run.log")"
    fi
}

cmd_log() {
    [[ -f $BASE/run.log ]] || fail "no log: has the run been started?"
    if [[ ${1-} == follow ]]; then exec tail -n 100 -F "$BASE/run.log"; else tail -n 100 "$BASE/run.log"; fi
}

cmd_exec() {
    local -r bucket=$1
    shift
    prepare "$bucket"
    exec "$@"
}

cmd_pack() {
    local -r run=$1 with_checkpoints=${2-}
    [[ -d $STORAGE/runs/$run ]] || fail "no run $run; there are: $(ls "$STORAGE/runs" 2>/dev/null)"
    local options=()
    [[ -n $with_checkpoints ]] || options+=(--exclude=./checkpoints)
    tar -czf "$BASE/$run.tar.gz" -C "$STORAGE/runs/$run" "${options[@]}" .
}

readonly COMMAND=$1
shift
case $COMMAND in
    install | start | stop | status | log | exec | pack) "cmd_$COMMAND" "$@" ;;
    exit-code) cmd_exit_code ;;
    supervised) supervised "$@" ;;
    *) fail "$COMMAND is no command of worker.sh" ;;
esac
