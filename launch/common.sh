# shellcheck shell=bash
# What the launchers share: settings from flags or a file, commands shown or run, mistakes in one line.
#
# A launcher sets SETTINGS, the names it knows (NAME or NAME=DEFAULT), and SWITCHES, its flags without a
# value; then `read_arguments "$@"` fills the arrays `words` (subcommand) and `passed` (what stands after
# --) and one variable a setting and switch: --accelerator-type=X and the file's line ACCELERATOR_TYPE=X are the same, and the
# flag wins. Nothing is taken from anywhere else.

# shellcheck disable=SC2034 # the launchers use them
readonly FAULT=1 WRONG_INPUT=2 PREEMPTED=75 # the exit codes of docs/configuration.md

declare -A given=()
words=() passed=()
DRY_RUN=''

# What is done or found; --dry-run does and finds nothing.
say() { [[ -n $DRY_RUN ]] || printf '%s\n' "$*" >&2; }

# fail CODE LINE...: ends the launcher.
fail() {
    local -r code=$1
    shift
    printf 'error: %s\n' "$*" >&2
    exit "$code"
}

# The head of a script, up to the first line that is no comment, is its help.
help_of() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$1"; }

# A command as it could be typed.
typed() { printf '%q ' "$@" | sed 's/ $//'; }

# Runs a command, or prints it where --dry-run was given.
run() {
    if [[ -n $DRY_RUN ]]; then
        printf '+ %s\n' "$(typed "$@")"
    else
        "$@"
    fi
}

# need PROGRAM REMEDY
need() {
    [[ -n $DRY_RUN ]] || command -v "$1" >/dev/null || fail "$WRONG_INPUT" "$1 is not on PATH: $2"
}

_known() {
    local name
    for name in "${SETTINGS[@]%%=*}"; do [[ $name == "$1" ]] && return; done
    return 1
}

_flag() {
    local -r name=${1,,}
    printf -- '--%s' "${name//_/-}"
}

_set_from_flag() {
    local name=${1%%=*}
    name=${name#--} name=${name//-/_}
    _known "${name^^}" || fail "$WRONG_INPUT" "$1 is not known: see \`${0##*/} help\`"
    given[${name^^}]=${1#*=}
}

# Lines NAME=VALUE; the file is read, never run.
_read_file() {
    local line name value number=0
    [[ -f $1 ]] || fail "$WRONG_INPUT" "--settings=$1: no such file; copy the example beside this script"
    while IFS= read -r line || [[ -n $line ]]; do
        ((++number))
        [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
        [[ $line =~ ^([A-Z_]+)=(.*)$ ]] ||
            fail "$WRONG_INPUT" "$1 line $number: '$line' is not NAME=VALUE"
        name=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
        [[ $value =~ ^\"(.*)\"$ || $value =~ ^\'(.*)\'$ ]] && value=${BASH_REMATCH[1]}
        _known "$name" ||
            fail "$WRONG_INPUT" "$1 line $number: $name is not known; known: ${SETTINGS[*]%%=*}"
        [[ -v given[$name] ]] || given[$name]=$value
    done <"$1"
}

read_arguments() {
    local word name file=''
    for name in "${SETTINGS[@]}"; do
        [[ $name == *=* ]] || name+='='
        printf -v "${name%%=*}" '%s' "${name#*=}"
    done
    for name in "${SWITCHES[@]}"; do
        name=${name//-/_}
        printf -v "${name^^}" ''
    done
    while (($# > 0)); do
        word=$1
        shift
        case $word in
            --)
                passed=("$@")
                break
                ;;
            --dry-run) DRY_RUN=1 ;;
            --settings=*) file=${word#*=} ;;
            --*=*) _set_from_flag "$word" ;;
            --*)
                [[ " ${SWITCHES[*]} " == *" ${word#--} "* ]] ||
                    fail "$WRONG_INPUT" "$word is not known, or has no value: write $word=VALUE, and the run's own flags after --"
                name=${word#--} name=${name//-/_}
                printf -v "${name^^}" 1
                ;;
            *) words+=("$word") ;;
        esac
    done
    [[ -z $file ]] || _read_file "$file"
    for name in "${!given[@]}"; do printf -v "$name" '%s' "${given[$name]}"; done
}

# require NAME...: these settings must have a value.
require() {
    local name
    for name in "$@"; do
        [[ -n ${!name-} ]] ||
            fail "$WRONG_INPUT" "$name is missing: give $(_flag "$name")=VALUE, or a line $name=VALUE in the file of --settings"
    done
}

# check NAME PATTERN RULE: a setting, where it has a value, matches.
check() {
    local -r name=$1 pattern=$2 rule=$3
    [[ -z ${!name-} || ${!name} =~ ^($pattern)$ ]] ||
        fail "$WRONG_INPUT" "$(_flag "$name")=${!name}: $rule"
}

# The run's flags may not name what the launcher sets itself.
refuse_passed() {
    local word flag
    for word in "${passed[@]}"; do
        for flag in "$@"; do
            [[ $word != "$flag" && $word != "$flag="* ]] ||
                fail "$WRONG_INPUT" "$word: the launcher sets $flag itself; leave it out"
        done
    done
}
