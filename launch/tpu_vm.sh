#!/usr/bin/env bash
# Makes a TPU (or takes the one that is there), runs research.main on all its workers, goes on after preemptions, deletes it.
#   launch/tpu_vm.sh PROJECT=p ZONE=z TPU_TYPE=v6e-16 TPU_VERSION=v2-alpha-tpuv6e -- --config=... --workdir=...
set -euo pipefail
# shellcheck disable=SC2154  # settings.py assigns them.
here=$(cd "$(dirname "$0")" && pwd)
settings=$(python3 "$here/settings.py" --require=PROJECT,ZONE,TPU_TYPE,TPU_VERSION -- "$@")
eval "$settings"

if [[ $SERVERS != 0 ]]; then
  echo "error: SERVERS = $SERVERS: this launcher starts none. Leave it at 0, and name servers that are there: --config.rollout.servers." >&2
  exit 2
fi

place=("--project=$PROJECT" "--zone=$ZONE")
archive=$(mktemp -d)/understudy.tar.gz
trap 'rm -rf "$(dirname "$archive")"' EXIT
trap 'say "interrupted. $RUN_NAME is still there, and costs; the same command goes on, or delete it:"; DRY_RUN=1 delete; exit 130' INT TERM

say() { echo "tpu_vm.sh: $*" >&2; }

call() {
  if [[ $DRY_RUN == 1 ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

create() {
  local flags=("--node-id=$RUN_NAME" "--accelerator-type=$TPU_TYPE" "--runtime-version=$TPU_VERSION")
  [[ $SPOT == 1 ]] && flags+=(--spot)
  call gcloud compute tpus queued-resources create "$RUN_NAME" "${place[@]}" "${flags[@]}"
}

delete() {
  call gcloud compute tpus queued-resources delete "$RUN_NAME" "${place[@]}" --force --quiet
}

# On every worker. A worker whose connection is dead is given up after two minutes.
remote() {
  call gcloud compute tpus tpu-vm ssh "$RUN_NAME" "${place[@]}" --worker=all \
    --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4 "--command=$1"
}

# The state of a queued resource or of its tpu-vm; ABSENT if there is none, UNKNOWN if it can't be had.
state() {
  local answer
  if answer=$(gcloud compute tpus "$1" describe "$RUN_NAME" "${place[@]}" "--format=value($2)" 2>&1); then
    echo "${answer##*$'\n'}"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    say "$answer"
    echo UNKNOWN
  fi
}

make_ready() {
  local queue node=
  while true; do
    queue=$(state queued-resources state.state)
    [[ $queue == ACTIVE ]] && node=$(state tpu-vm state)
    say "$RUN_NAME: $queue $node"
    case $queue in
      ABSENT) create ;;
      SUSPENDED) delete ;;
      FAILED) say "no TPU could be made: gcloud compute tpus queued-resources describe $RUN_NAME ${place[*]}" && exit 1 ;;
      ACTIVE)
        case $node in
          READY) return ;;
          PREEMPTED | TERMINATED | STOPPED | ABSENT) delete ;;
        esac
        ;;
    esac
    sleep "$POLL"
  done
}

# Whether tar with this status left nothing out. GNU's says 1 where a file changed as it was read, such as one of .git;
# another's says 1 of any error.
only_changed() { [[ $1 == 1 && $(tar --version) == *GNU* ]] || return "$1"; }

# Ends what a lost connection may have left running (it saves), and installs this folder as it is now. The TPU's own
# Python can be older than 3.11.
prepare() {
  call tar -czf "$archive" -C "$here/.." --exclude=./runs --exclude=./.venv --exclude='*.egg-info' . || only_changed $? &&
    call gcloud compute tpus tpu-vm scp "$archive" "$RUN_NAME:understudy.tar.gz" "${place[@]}" --worker=all &&
    remote "set -e
pkill -TERM -f '[r]esearch.main' || true
for _ in \$(seq $GRACE); do pgrep -f '[r]esearch.main' > /dev/null || break; sleep 1; done
pkill -KILL -f '[r]esearch.main' || true
rm -rf understudy && mkdir understudy && tar -xzf understudy.tar.gz -C understudy
python3 -m pip install --quiet --user uv
[ -d venv ] || ~/.local/bin/uv venv --quiet --python 3.12 venv
~/.local/bin/uv pip install --quiet --python venv/bin/python -e './understudy[tpu]'
$SETUP"
}

start() {
  remote "cd understudy && exec ../venv/bin/python -u -m research.main $RUN"
}

if [[ $DRY_RUN == 1 ]]; then
  create
  prepare
  start
  say "and up to $MAX_RESTARTS times again, from the first line if the TPU was preempted, else from the second; at the end:"
  [[ $KEEP == 1 ]] || delete
  exit
fi

for ((restarts = 0; ; restarts++)); do
  make_ready
  status=0
  { prepare && start; } || status=$?
  say "status $status after $restarts of $MAX_RESTARTS restarts"
  # 255 is a lost connection; a TPU that isn't READY was taken away, whatever the status.
  if ((status != 75 && status != 76 && status <= 128)) && { ((status == 0)) || [[ $(state tpu-vm state) == READY ]]; }; then
    break
  fi
  ((restarts < MAX_RESTARTS)) || break
done
[[ $KEEP == 1 ]] || delete
exit "$status"
