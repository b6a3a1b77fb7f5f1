#!/usr/bin/env bash
# Hands a run to SkyPilot as a managed job:
#   launch/skypilot.sh PLATFORM=gpu ACCELERATORS=H100:8 BUCKET=gs://b -- --config=... --workdir=/mnt/runs/x
set -euo pipefail
# shellcheck disable=SC2154  # settings.py assigns them.
here=$(cd "$(dirname "$0")" && pwd)
settings=$(python3 "$here/settings.py" --require=BUCKET --mount=/mnt/runs -- "$@")
eval "$settings"

if [[ $SERVERS != 0 ]]; then
  echo "error: SERVERS = $SERVERS: this launcher starts none. Leave it at 0, and name servers that are there: --config.rollout.servers." >&2
  exit 2
fi

if [[ $PROCESSES != 1 ]]; then
  echo "error: PROCESSES = $PROCESSES: a node is one process here, which has all of its devices. Leave it at 1." >&2
  exit 2
fi

submit=(sky jobs launch --yes "--name=$RUN_NAME" "--num-nodes=$NODES")
[[ -n $ACCELERATORS ]] && submit+=("--gpus=$ACCELERATORS")
if [[ $SPOT == 1 ]]; then submit+=(--use-spot); else submit+=(--no-use-spot); fi
submit+=("--env=RUN=$RUN" "--env=BUCKET=$BUCKET" "--env=PLATFORM=$PLATFORM" "--env=DEVICES=$DEVICES")
submit+=("$here/skypilot.yaml")

cd "$here/.."
if [[ $DRY_RUN == 1 ]]; then
  printf '%q ' "${submit[@]}"
  echo
else
  "${submit[@]}"
fi
