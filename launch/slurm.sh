#!/usr/bin/env bash
# Submits a run to Slurm: launch/slurm.sh NODES=2 PROCESSES=4 PLATFORM=gpu [--dry_run] -- --config=... --workdir=...
set -euo pipefail
# shellcheck disable=SC2154  # settings.py assigns them.
here=$(cd "$(dirname "$0")" && pwd)
settings=$(python3 "$here/settings.py" -- "$@")
eval "$settings"

if [[ $PLATFORM == gpu && $DEVICES != 1 && $PROCESSES != 1 ]]; then
  echo "error: DEVICES = $DEVICES: of several processes on a node, JAX gives each one GPU. Set DEVICES or PROCESSES to 1." >&2
  exit 2
fi

# --signal: SIGTERM to the tasks GRACE seconds before the time limit.
# Servers have nodes of their own, behind those of the run; --export=ALL hands these settings on.
export SERVERS SERVER_MODEL VLLM SERVER_PORT SERVER_DEVICES SERVER_LORA_RANK SERVER_OPTIONS
export SERVERS_PY=$here/servers.py
gpus=$((PROCESSES * DEVICES))
((SERVERS == 0 || SERVER_DEVICES <= gpus)) || gpus=$SERVER_DEVICES
submit=(sbatch "--job-name=$RUN_NAME" "--nodes=$((NODES + SERVERS))" "--ntasks-per-node=$PROCESSES" "--signal=TERM@$GRACE")
[[ $PLATFORM == gpu ]] && submit+=("--gpus-per-node=$gpus")
[[ -n $PARTITION ]] && submit+=("--partition=$PARTITION")
[[ -n $ACCOUNT ]] && submit+=("--account=$ACCOUNT")
[[ -n $TIME_LIMIT ]] && submit+=("--time=$TIME_LIMIT")
submit+=("--export=ALL,PLATFORM=$PLATFORM,DEVICES=$DEVICES,MAX_RESTARTS=$MAX_RESTARTS,GRACE=$GRACE")
submit+=("$here/slurm.sbatch" "${ARGUMENTS[@]}")

if [[ $DRY_RUN == 1 ]]; then
  printf '%q ' "${submit[@]}"
  echo
else
  "${submit[@]}"
fi
