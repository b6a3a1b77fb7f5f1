"""Hands a run to Kubernetes as a JobSet, one pod per node.

    python launch/jobset.py --platform=gpu --nodes=2 --devices=8 --image=IMAGE --claim=CLAIM \
        -- --config=experiments/sft.py --workdir=/mnt/runs/sft

With --dry_run it prints the manifest, ready for `kubectl create -f -`.
"""

import json
import shlex
import string
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import servers as servers_lib
import settings as settings_lib

TEMPLATE = Path(__file__).with_name("jobset.yaml")
MOUNT = "/mnt/runs"
PORT = 8476


def main(argv: Sequence[str]) -> int:
    try:
        settings, dry_run = settings_lib.read(argv, require=("IMAGE", "CLAIM"), mount=MOUNT)
        made = manifest(settings)
    except settings_lib.SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return settings_lib.BAD_INPUT
    if dry_run:
        print(made, end="")
        return 0
    return subprocess.run(["kubectl", "create", "-f", "-"], input=made, text=True).returncode


def manifest(settings: Mapping[str, str]) -> str:
    """The manifest, as YAML.

    Raises:
      SettingError: settings don't suit each other or Kubernetes.
    """
    _check(settings)
    name, platform, devices = settings["RUN_NAME"], settings["PLATFORM"], int(settings["DEVICES"])
    annotations, selector, limits, environment = {}, {}, {}, []
    if platform == "tpu":
        # The peers, and the slices, are told by GKE's own variables, which JAX reads.
        annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
        selector["cloud.google.com/gke-tpu-accelerator"] = settings["ACCELERATOR"]
        selector["cloud.google.com/gke-tpu-topology"] = settings["TOPOLOGY"]
        limits["google.com/tpu"] = devices
    else:
        index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        environment += [
            {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{name}-node-0-0.{name}:{PORT}"},
            {"name": "JAX_NUM_PROCESSES", "value": settings["NODES"]},
            {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
        ]
        if platform == "gpu":
            limits["nvidia.com/gpu"] = devices
        else:
            environment += [
                {"name": "JAX_PLATFORMS", "value": "cpu"},
                {"name": "JAX_NUM_CPU_DEVICES", "value": settings["DEVICES"]},
            ]
    run = settings["RUN"]
    if hosts := [f"{name}-server-0-{i}.{name}" for i in range(int(settings["SERVERS"]))]:
        run = servers_lib.run_with(run, servers_lib.urls(settings, hosts))
    parts = {
        "ANNOTATIONS": annotations,
        "NODE_SELECTOR": selector,
        "LIMITS": limits,
        "ENVIRONMENT": environment,
        "ARGUMENTS": shlex.split(run),
    }
    numbers = {key: int(settings[key]) for key in ("MAX_RESTARTS", "SLICES", "NODES", "GRACE")}
    # JSON is YAML, so that nothing in a value can be taken for more than a value.
    filled = {key: json.dumps(value) for key, value in {**settings, **numbers, **parts}.items()}
    filled |= {"SUCCESS": "", "SERVER_JOB": ""}
    if hosts:
        # The servers never end by themselves: the run's end is that of all.
        success = {"operator": "All", "targetReplicatedJobs": ["node"]}
        filled["SUCCESS"] = f"  successPolicy: {json.dumps(success)}\n"
        filled["SERVER_JOB"] = f"    - {json.dumps(server_job(settings))}\n"
    return string.Template(TEMPLATE.read_text()).substitute(filled)


def server_job(settings: Mapping[str, str]) -> dict[str, Any]:
    """The replicated job of the servers: one pod each, started again where it ends, or is silent for two minutes."""
    words, environment = servers_lib.command({**settings, "SERVER_HOST": "0.0.0.0"}, 0, 0)
    environment.pop("CUDA_VISIBLE_DEVICES", None)  # a pod sees its own GPUs alone
    port, devices = int(settings["SERVER_PORT"]), int(settings["SERVER_DEVICES"])
    health = {"httpGet": {"path": "/health", "port": port}, "timeoutSeconds": 10}
    container = {
        "name": "server",
        "image": settings["SERVER_IMAGE"],
        "command": words[:1],
        "args": words[1:],
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "ports": [{"containerPort": port, "protocol": "TCP"}],
        "resources": {"limits": {} if settings["PLATFORM"] == "cpu" else {"nvidia.com/gpu": devices}},
        "startupProbe": {**health, "periodSeconds": 5, "failureThreshold": int(servers_lib.START_SECONDS / 5)},
        "livenessProbe": {**health, "periodSeconds": 10, "failureThreshold": int(servers_lib.SILENT_SECONDS / 10)},
        "volumeMounts": [{"name": "runs", "mountPath": MOUNT}],
    }
    pod = {
        "restartPolicy": "OnFailure",
        "terminationGracePeriodSeconds": 30,
        "containers": [container],
        "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": settings["CLAIM"]}}],
    }
    count = int(settings["SERVERS"])
    job = {"completionMode": "Indexed", "completions": count, "parallelism": count}
    job |= {"backoffLimit": int(settings["MAX_RESTARTS"]), "template": {"spec": pod}}
    return {"name": "server", "replicas": 1, "template": {"spec": job}}


def _check(settings: Mapping[str, str]) -> None:
    def fail(name: str, why: str) -> None:
        raise settings_lib.SettingError(f"{name} = {settings[name]!r}: {why}")

    if settings["SERVERS"] != "0":
        if not settings["SERVER_IMAGE"]:
            fail("SERVER_IMAGE", "is missing: an image with vLLM and its plugin, see launch/Dockerfile.vllm.")
        if not settings["SERVER_MODEL"].startswith(f"{MOUNT}/"):
            fail("SERVER_MODEL", f"isn't under {MOUNT}, all that a pod sees.")
    if settings["PROCESSES"] != "1":
        fail("PROCESSES", "a pod is one process, with DEVICES devices. Leave it at 1.")
    if settings["PLATFORM"] == "tpu":
        for name in ("ACCELERATOR", "TOPOLOGY"):
            if not settings[name]:
                fail(name, f"is missing. Give the node pool's label as {name}=VALUE.")
    elif settings["SLICES"] != "1":
        fail("SLICES", "only TPUs come in slices. Raise NODES.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
