"""Launchers, with a stand-in for research.main and for the commands of clusters, which record what they are asked."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parent.parent / "launch"
RUN = ("--config=experiments/sft.py", "--workdir=/mnt/runs/my run")
CLOUD = ("PROJECT=p", "ZONE=z", "TPU_TYPE=v6e-16", "TPU_VERSION=v2", "POLL=0")
TPU = ("PLATFORM=tpu", "NODES=4", "DEVICES=4", "SLICES=2", "ACCELERATOR=tpu-v6e-slice", "TOPOLOGY=4x4")

# Each line of the file `script` is one start of the run: what each of its processes does.
STAND_IN = """
import os, signal, sys, time
from pathlib import Path
flags = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:])
rank = int(flags.get("process_id", 0))
starts = Path(f"starts_{rank}")
n = int(starts.read_text()) if starts.exists() else 0
starts.write_text(str(n + 1))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("start", n, "of", rank, flags.get("num_processes"), os.environ.get("JAX_NUM_CPU_DEVICES"))
print("a bad line", file=sys.stderr)
does = Path("script").read_text().splitlines()[n].split()[rank]
if does == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if does == "sleep":
    for _ in range(600):  # One long sleep isn't interrupted by a signal that comes just before it.
        time.sleep(0.1)
sys.exit(int(does))
"""


@pytest.fixture
def box(tmp_path, monkeypatch):
    """An empty folder to run in, with a `bin` first in PATH, and no setting in the environment."""
    for name in settings_names():
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "research").mkdir()
    (tmp_path / "research" / "__init__.py").touch()
    (tmp_path / "research" / "main.py").write_text(STAND_IN)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings_names():
    lines = (LAUNCH / "settings.env").read_text().splitlines()
    return [line.split("=")[0] for line in lines if line and not line.startswith("#")]


def launch(name, *arguments, run=RUN, **environment):
    command = [sys.executable] if name.endswith(".py") else ["bash"]
    return subprocess.run(
        [*command, LAUNCH / name, *arguments, *(["--", *run] if run else [])],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def stand_in(box, name, script):
    """A command that writes its arguments to calls.jsonl and then does what the script says."""
    path = box / "bin" / name
    path.write_text(
        f"#!{sys.executable}\nimport json, os, sys, time\nfrom pathlib import Path\nargv = sys.argv[1:]\n"
        f"with open({str(box / 'calls.jsonl')!r}, 'a') as file:\n    print(json.dumps([{name!r}, *argv]), file=file)\n"
        f"os.chdir({str(box)!r})\n{script}\n"
    )
    path.chmod(0o755)


def calls(box):
    path = box / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# Settings


def test_command_line_comes_before_environment_before_file(box):
    made = launch("slurm.sh", "NODES=3", "--processes=4", "--dry_run", NODES="2", PARTITION="fast")
    words = shlex.split(made.stdout)
    assert {"--nodes=3", "--ntasks-per-node=4", "--partition=fast", "--job-name=understudy"} <= set(words), made
    assert words[-2:] == list(RUN)


@pytest.mark.parametrize(
    ("arguments", "run", "says"),
    [
        (["--proceses=2"], RUN, "--proceses=2: no such setting. Did you mean PROCESSES?"),
        (["PROCESSES"], RUN, "PROCESSES: has no value. Write PROCESSES=VALUE."),
        (["PROCESSES=0"], RUN, "PROCESSES = '0': is no whole number from 1 on."),
        (["MAX_RESTARTS=many"], RUN, "MAX_RESTARTS = 'many'"),
        (["PLATFORM=quantum"], RUN, "PLATFORM = 'quantum': is none of cpu, gpu, tpu."),
        (["RUN_NAME=My Run"], RUN, "RUN_NAME = 'My Run'"),
        ([], (), "RUN: is missing."),
        ([], ("--config=x",), "has no --workdir="),
        ([], ("--workdir=x", "--config"), "has no --config="),
        (["RUN='"], (), "No closing quotation"),
        (["NODES=2"], RUN, "NODES = '2'"),
        (["PLATFORM=tpu"], RUN, "PLATFORM = 'tpu'"),
    ],
)
def test_bad_settings_are_named(box, arguments, run, says):
    made = launch("local.py", *arguments, run=run)
    assert made.returncode == 2
    assert says in made.stderr
    assert "Traceback" not in made.stderr
    assert not made.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "run", "says"),
    [
        ("slurm.sh", ["PLATFORM=gpu", "DEVICES=4", "PROCESSES=2"], RUN, "DEVICES = 4"),
        ("jobset.py", ["IMAGE=i"], RUN, "CLAIM: is missing."),
        ("jobset.py", ["IMAGE=i", "CLAIM=c", "PROCESSES=2"], RUN, "PROCESSES = '2'"),
        ("jobset.py", ["IMAGE=i", "CLAIM=c", "PLATFORM=tpu"], RUN, "ACCELERATOR = ''"),
        ("jobset.py", ["IMAGE=i", "CLAIM=c", "SLICES=2"], RUN, "SLICES = '2'"),
        ("jobset.py", ["IMAGE=i", "CLAIM=c"], ("--config=x", "--workdir=/home/x"), "isn't under /mnt/runs"),
        ("tpu_vm.sh", ["PROJECT=p"], RUN, "ZONE: is missing."),
        ("skypilot.sh", [], RUN, "BUCKET: is missing."),
        ("skypilot.sh", ["BUCKET=gs://b"], ("--config=x", "--workdir", "runs/x"), "isn't under /mnt/runs"),
        ("skypilot.sh", ["BUCKET=gs://b", "PROCESSES=2"], RUN, "PROCESSES = 2"),
    ],
)
def test_what_a_launcher_lacks_is_named(box, name, arguments, run, says):
    made = launch(name, *arguments, "--dry_run", run=run)
    assert made.returncode == 2
    assert says in made.stderr
    assert not made.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "command"),
    [
        ("local.py", ["PROCESSES=2"], sys.executable),
        ("slurm.sh", [], "sbatch"),
        ("jobset.py", ["IMAGE=i", "CLAIM=c"], "kubectl"),
        ("tpu_vm.sh", [*CLOUD], "gcloud"),
        ("skypilot.sh", ["BUCKET=gs://b"], "sky"),
    ],
)
def test_dry_run_prints_and_touches_nothing(box, name, arguments, command):
    for other in ("sbatch", "kubectl", "gcloud", "sky"):
        stand_in(box, other, "sys.exit(1)")
    there = sorted(box.rglob("*"))
    made = launch(name, *arguments, "--dry_run")
    assert made.returncode == 0, made.stderr
    assert ("kind: JobSet" if command == "kubectl" else command) in made.stdout
    assert "my run" in made.stdout.replace("\\", "")
    assert sorted(box.rglob("*")) == there


# local.py


@pytest.mark.parametrize(
    ("script", "restarts", "status", "starts"),
    [
        (["0 0"], 3, 0, 1),
        (["75 75", "76 kill", "0 0"], 3, 0, 3),
        (["75 75", "75 75"], 1, 75, 2),
        (["2 76"], 3, 2, 1),
        (["76 3"], 3, 3, 1),
        (["1 76"], 3, 1, 1),
        (["sleep kill", "0 0"], 1, 0, 2),
        (["kill 76"], 0, 137, 1),
    ],
)
def test_local_starts_again_what_goes_on(box, script, restarts, status, starts):
    (box / "script").write_text("\n".join(script))
    made = launch("local.py", "PROCESSES=2", "DEVICES=3", f"MAX_RESTARTS={restarts}", "GRACE=1")
    assert made.returncode == status, made
    assert [(box / f"starts_{i}").read_text() for i in range(2)] == [str(starts)] * 2
    lines = made.stdout.splitlines()
    assert {"[0] start 0 of 0 2 3", "[1] start 0 of 1 2 3", "[0] a bad line", "[1] a bad line"} <= set(lines)
    if "sleep" in script[0]:
        assert "process 1 ended with SIGKILL" in made.stderr
        assert "process 0 still runs 1 s later: killed" in made.stderr


def test_local_forwards_a_signal_and_does_not_start_again(box):
    (box / "script").write_text("sleep sleep\n0 0")
    command = [sys.executable, LAUNCH / "local.py", "PROCESSES=2", "--", *RUN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launcher:
        seen = [launcher.stdout.readline() for _ in range(4)]  # all have set their handlers
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(30) == 75, seen
    assert (box / "starts_1").read_text() == "1"


@pytest.mark.slow
def test_local_goes_on_after_a_process_was_killed(tmp_path, monkeypatch):
    """research.main itself: the launcher and the run agree on flags, environment and statuses."""
    flags = "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    monkeypatch.setenv("XLA_FLAGS", flags)
    workdir = tmp_path / "run"
    fields = {"steps": 16, "log.every": 1, "eval.every": 0, "checkpoint.every": 3, "checkpoint.best_metric": ""}
    fields |= {"mesh.data": 2, "mesh.fsdp": 2}
    run = ["--config=experiments/sft.py:debug", f"--workdir={workdir}"]
    run += [f"--config.{name}={value}" for name, value in fields.items()]
    command = [sys.executable, LAUNCH / "local.py", "PROCESSES=2", "DEVICES=2", "--", *run]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launcher:
        lines = []
        for line in launcher.stdout:
            lines.append(line)
            if "step 5/16" in line and not any("SIGKILL" in earlier for earlier in lines):
                os.kill(json.loads((workdir / "processes" / "1.json").read_text())["pid"], signal.SIGKILL)
    output = "".join(lines)
    assert launcher.returncode == 0, output
    assert "process 1 ended with SIGKILL" in output
    assert "[0] error: process 0: process 1 (pid " in output, "the survivor says who died"
    assert "[0] resumed  at step " in output
    assert (workdir / "done.json").exists()


def test_local_gives_each_process_its_own_gpus(box):
    made = launch("local.py", "PLATFORM=gpu", "PROCESSES=2", "DEVICES=2", "--dry_run")
    first, second = map(shlex.split, made.stdout.splitlines())
    assert "CUDA_VISIBLE_DEVICES=0,1" in first
    assert "CUDA_VISIBLE_DEVICES=2,3" in second
    assert "JAX_PLATFORMS=cpu" not in first
    assert second[-2:] == ["--num_processes=2", "--process_id=1"]
    assert first[-3] == second[-3]
    assert first[-3].startswith("--coordinator=localhost:")


# Slurm


@pytest.mark.parametrize(
    ("status", "count", "requeued"),
    [(0, 0, False), (2, 0, False), (3, 0, False), (75, 0, True), (76, 1, True), (137, 0, True), (75, 2, False)],
)
def test_slurm_requeues_what_goes_on(box, status, count, requeued):
    stand_in(box, "srun", f"Path('env').write_text(os.environ['JAX_NUM_CPU_DEVICES'])\nsys.exit({status})")
    stand_in(box, "scontrol", "")
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_RESTART_COUNT": str(count)}
    made = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch", *RUN],
        env=os.environ | job | {"PLATFORM": "cpu", "DEVICES": "2", "MAX_RESTARTS": "2", "GRACE": "30"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    done = calls(box)
    assert done[0] == [
        "srun",
        "--kill-on-bad-exit=0",
        "--wait=30",
        "--label",
        *shlex.split("python -u -m research.main"),
        *RUN,
    ]
    assert done[1:] == ([["scontrol", "requeue", "7"]] if requeued else [])
    assert made.returncode == (0 if requeued else status)
    assert (box / "env").read_text() == "2"


def test_slurm_script_outlives_tasks_that_save(box):
    """Slurm signals the shell as well when it takes a job away; it must wait, and leave the requeueing to Slurm."""
    stand_in(box, "srun", "time.sleep(2)\nPath('saved').touch()\nsys.exit(75)")
    stand_in(box, "scontrol", "")
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    with subprocess.Popen(["bash", LAUNCH / "slurm.sbatch", *RUN], env=os.environ | job) as shell:
        wait_for(lambda: calls(box))
        shell.send_signal(signal.SIGTERM)
        assert shell.wait(30) == 75
    assert (box / "saved").exists()
    assert [call[0] for call in calls(box)] == ["srun"]


def wait_for(happened):
    until = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("per_node", ["PROCESSES=4", "DEVICES=4"])
def test_slurm_submits_gpus(box, per_node):
    stand_in(box, "sbatch", "")
    made = launch("slurm.sh", "PLATFORM=gpu", "NODES=2", per_node, "TIME_LIMIT=2:00:00", "ACCOUNT=a", "GRACE=90")
    assert made.returncode == 0, made.stderr
    (call,) = calls(box)
    assert {"--gpus-per-node=4", "--signal=TERM@90", "--time=2:00:00", "--account=a"} <= set(call)
    assert call[-3:] == [str(LAUNCH / "slurm.sbatch"), *RUN]


# Kubernetes


@pytest.mark.parametrize("settings", [("NODES=2", "DEVICES=2"), ("PLATFORM=gpu", "NODES=2", "DEVICES=8"), TPU])
def test_jobset_is_one(box, settings):
    """By the models that Kubeflow's maintainers generate from the API of JobSet and Kubernetes."""
    from kubeflow_trainer_api import models

    stand_in(box, "kubectl", "Path('stdin').write_text(sys.stdin.read())")
    made = launch("jobset.py", "IMAGE=i", "CLAIM=c", *settings)
    assert made.returncode == 0, made.stderr
    assert calls(box) == [["kubectl", "create", "-f", "-"]]
    manifest = yaml.safe_load((box / "stdin").read_text())
    # A field that the API doesn't know would be missing from the second.
    assert models.JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest

    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    platform = dict(s.split("=") for s in settings).get("PLATFORM", "cpu")
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert container["args"] == list(RUN)
    assert pod["restartPolicy"] == "Never"
    assert job["backoffLimit"] == 0
    assert job["completions"] == job["parallelism"] == (4 if platform == "tpu" else 2)
    if platform == "tpu":
        assert replicated["replicas"] == 2
        assert container["resources"]["limits"] == {"google.com/tpu": 4}
        assert set(pod["nodeSelector"].values()) == {"tpu-v6e-slice", "4x4"}
        assert not environment
    else:
        # The name that JobSet gives the first pod: JOBSET-REPLICATEDJOB-JOB-POD.SUBDOMAIN.
        assert environment["JAX_COORDINATOR_ADDRESS"] == "understudy-node-0-0.understudy:8476"
        assert environment["JAX_NUM_PROCESSES"] == "2"
        assert container["resources"]["limits"] == ({"nvidia.com/gpu": 8} if platform == "gpu" else {})
        assert environment.get("JAX_NUM_CPU_DEVICES") == ("2" if platform == "cpu" else None)
    (rule,) = job["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    final = [code for code in (1, 2, 3, 75, 76, 137, 143) if (code in codes["values"]) == (codes["operator"] == "In")]
    assert final == [1, 2, 3]


# Servers beside a run


SERVERS = ("SERVER_MODEL=/mnt/runs/exported", "SERVER_LORA_RANK=8", "SERVER_OPTIONS=--max-model-len 512")
# Answers as a server does, notes its start, and ends at once where its folder says so.
VLLM = """
import http.server
port = int(argv[argv.index("--port") + 1])
with open(f"pids_{port}", "a") as file:
    print(os.getpid(), file=file)
if Path("no_server").exists():
    print("no such model")
    sys.exit(1)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args):
        pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def ports():
    """The first of two ports that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_local_starts_servers_first_and_again(box, ports):
    stand_in(box, "vllm", VLLM)
    (box / "script").write_text("sleep")
    files = [box / f"pids_{port}" for port in (ports, ports + 1)]
    command = [sys.executable, LAUNCH / "local.py", "SERVERS=2", f"SERVER_PORT={ports}", *SERVERS, "--", *RUN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launcher:
        wait_for(lambda: (box / "starts_0").exists())
        assert all(file.exists() for file in files), "the run began before its servers"
        os.kill(int(files[1].read_text()), signal.SIGKILL)
        wait_for(lambda: len(files[1].read_text().split()) == 2)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(30) == 75
        output = launcher.stdout.read()
    assert "server 1 ended with status -9: starts again" in output
    assert len(files[0].read_text().split()) == 1
    for pid in " ".join(file.read_text() for file in files).split():
        assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]
    asked = calls(box)[0]
    assert asked[1:3] == ["serve", "/mnt/runs/exported"]
    assert {"--max-lora-rank", "512", "processed_logprobs", '{"backend": "understudy"}'} <= set(asked)


def test_local_ends_where_a_server_cannot_start(box, ports):
    stand_in(box, "vllm", VLLM)
    (box / "no_server").touch()
    made = launch("local.py", "SERVERS=1", f"SERVER_PORT={ports}", *SERVERS)
    assert made.returncode == 1
    assert "[server 0] no such model" in made.stdout
    assert not (box / "starts_0").exists()


def test_a_silent_server_is_started_again(box, ports, monkeypatch):
    monkeypatch.syspath_prepend(LAUNCH)
    import servers

    stand_in(box, "vllm", VLLM)
    server = servers.Server(0, ["vllm", "--port", str(ports)], {}, f"http://127.0.0.1:{ports}", restarts=1)
    server.start()
    wait_for(lambda: server.look() or server.up)
    os.kill(int((box / f"pids_{ports}").read_text()), signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(servers, "SILENT_SECONDS", 0.1)
        patch.setattr(servers, "_answers", lambda url: False)
        wait_for(lambda: server.look() or not server.up)
    wait_for(lambda: server.look() or server.up)
    server.signal(signal.SIGKILL)
    wait_for(lambda: server.look() or server.gone)  # no restart is left


def test_the_run_is_told_of_its_servers(box):
    made = launch("local.py", "PLATFORM=gpu", "DEVICES=2", "SERVERS=2", "SERVER_DEVICES=2", *SERVERS, "--dry_run")
    first, second, run = map(shlex.split, made.stdout.splitlines())
    assert "CUDA_VISIBLE_DEVICES=2,3" in first
    assert "CUDA_VISIBLE_DEVICES=4,5" in second
    assert second[second.index("--tensor-parallel-size") + 1] == "2"
    assert run[-2:] == [
        "--config.rollout.engine=vllm",
        "--config.rollout.servers=('http://127.0.0.1:8100', 'http://127.0.0.1:8101')",
    ]
    own = launch("local.py", "SERVERS=1", *SERVERS, "--dry_run", run=(*RUN, "--config.rollout.servers=('x',)"))
    assert own.stdout.count("config.rollout.servers") == 1


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("local.py", ["SERVERS=1"], "SERVER_MODEL: is missing."),
        ("jobset.py", ["SERVERS=1", "IMAGE=i", "CLAIM=c", "SERVER_IMAGE=v", "SERVER_MODEL=x"], "SERVER_MODEL = 'x'"),
        ("jobset.py", ["SERVERS=1", "IMAGE=i", "CLAIM=c", *SERVERS], "SERVER_IMAGE = ''"),
        ("tpu_vm.sh", ["SERVERS=1", *CLOUD, *SERVERS], "SERVERS = 1: this launcher starts none."),
        ("skypilot.sh", ["SERVERS=1", "BUCKET=gs://b", *SERVERS], "SERVERS = 1: this launcher starts none."),
    ],
)
def test_what_servers_lack_is_named(box, name, arguments, says):
    made = launch(name, *arguments, "--dry_run")
    assert made.returncode == 2
    assert says in made.stderr


def test_slurm_gives_servers_nodes_of_their_own(box):
    stand_in(box, "sbatch", "")
    made = launch("slurm.sh", "PLATFORM=gpu", "NODES=2", "PROCESSES=2", "SERVERS=1", "SERVER_DEVICES=4", *SERVERS)
    assert made.returncode == 0, made.stderr
    assert {"--nodes=3", "--gpus-per-node=4"} <= set(calls(box)[0])
    (box / "calls.jsonl").unlink()

    stand_in(box, "srun", "time.sleep(60 if 'servers.py' in ' '.join(argv) else 0.5)")
    stand_in(box, "scontrol", "print('n1\\nn2\\nn3')")
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "6", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_NTASKS_PER_NODE": "2"}
    settings = {"PLATFORM": "gpu", "SERVERS": "1", "SERVER_PORT": "8100"}
    made = subprocess.run(["bash", LAUNCH / "slurm.sbatch", *RUN], env=os.environ | job | settings, timeout=30)
    assert made.returncode == 0
    steps = {("servers" if any("servers.py" in word for word in call) else "run"): call for call in calls(box)[1:]}
    assert {"--nodes=2", "--ntasks=4", "--relative=0", "--config.rollout.servers=('http://n3:8100',)"} <= set(
        steps["run"]
    )
    assert {"--nodes=1", "--ntasks=1", "--relative=2", "--server_host=0.0.0.0"} <= set(steps["servers"])


def test_jobset_has_servers(box):
    from kubeflow_trainer_api import models

    servers = ("SERVERS=2", "SERVER_DEVICES=4", "SERVER_IMAGE=v", *SERVERS)
    made = launch("jobset.py", "IMAGE=i", "CLAIM=c", "PLATFORM=gpu", "NODES=2", *servers, "--dry_run")
    manifest = yaml.safe_load(made.stdout)
    assert models.JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest
    node, server = manifest["spec"]["replicatedJobs"]
    assert manifest["spec"]["successPolicy"] == {"operator": "All", "targetReplicatedJobs": ["node"]}
    (run,) = node["template"]["spec"]["template"]["spec"]["containers"]
    urls = tuple(f"http://understudy-server-0-{i}.understudy:8100" for i in range(2))
    assert run["args"][-1] == f"--config.rollout.servers={urls}"
    (container,) = server["template"]["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert container["args"][:2] == ["serve", "/mnt/runs/exported"]
    assert container["args"][container["args"].index("--host") + 1] == "0.0.0.0"
    assert container["livenessProbe"]["httpGet"] == {"path": "/health", "port": 8100}


# TPU VMs


FAKE_GCLOUD = """
tpu = json.loads(Path("tpu.json").read_text()) if Path("tpu.json").exists() else {"made": 0, "runs": 0, "node": None}
def leave(status=0):
    Path("tpu.json").write_text(json.dumps(tpu))
    sys.exit(status)
what = argv[2:4]
if what == ["queued-resources", "create"]:
    assert tpu["node"] is None
    tpu.update(made=tpu["made"] + 1, node="CREATING")
elif what == ["queued-resources", "delete"]:
    tpu["node"] = None
elif argv[3] == "describe":
    if tpu["node"] is None:
        print("ERROR: NOT_FOUND: Resource not found", file=sys.stderr)
        leave(1)
    queue = {"CREATING": "PROVISIONING", "PREEMPTED": "SUSPENDED" if tpu["made"] == 1 else "ACTIVE"}
    print(queue.get(tpu["node"], "ACTIVE") if argv[2] == "queued-resources" else tpu["node"])
    if tpu["node"] == "CREATING":
        tpu["node"] = "READY"
elif what == ["tpu-vm", "ssh"] and "research.main --config" in argv[-1]:
    assert tpu["node"] == "READY"
    does = Path("script").read_text().split()[tpu["runs"]]
    tpu["runs"] += 1
    if does == "preempted":
        tpu["node"] = "PREEMPTED"
        leave(1)
    leave(int(does))
leave()
"""


@pytest.mark.parametrize(
    ("script", "status", "made", "runs"),
    [
        ("preempted preempted 75 0", 0, 3, 4),  # suspended in the queue, then seen at the node first
        ("76 255 3", 3, 1, 3),
        ("2", 2, 1, 1),
        ("1", 1, 1, 1),
        ("75 75 75 75 75", 75, 1, 4),
    ],
)
def test_tpu_vm_makes_runs_and_deletes(box, script, status, made, runs):
    (box / "script").write_text(script)
    stand_in(box, "gcloud", FAKE_GCLOUD)
    stand_in(box, "tar", "")
    done = launch("tpu_vm.sh", *CLOUD, "MAX_RESTARTS=3", "SETUP=mount it")
    assert done.returncode == status, done
    assert json.loads((box / "tpu.json").read_text()) == {"made": made, "runs": runs, "node": None}, done.stderr
    asked = [call for call in calls(box) if call[0] == "gcloud"]
    assert all(call[1:3] == ["compute", "tpus"] and {"--project=p", "--zone=z"} <= set(call) for call in asked)
    creates = [call for call in asked if call[4] == "create"]
    assert all({"--spot", "--accelerator-type=v6e-16", "--runtime-version=v2"} <= set(call) for call in creates)
    commands = [call[-1].removeprefix("--command=") for call in asked if call[4] == "ssh"]
    assert commands[1].startswith("cd understudy && exec ../venv/bin/python")
    assert shlex.split(commands[1])[-2:] == list(RUN)
    assert commands[0].endswith("\nmount it")
    assert all("--worker=all" in call for call in asked if call[4] in ("ssh", "scp"))


def test_tpu_vm_takes_the_one_that_is_there_and_can_keep_it(box):
    (box / "script").write_text("0")
    (box / "tpu.json").write_text('{"made": 0, "runs": 0, "node": "READY"}')
    stand_in(box, "gcloud", FAKE_GCLOUD)
    stand_in(box, "tar", "")
    assert launch("tpu_vm.sh", *CLOUD, "KEEP=1").returncode == 0
    assert json.loads((box / "tpu.json").read_text()) == {"made": 0, "runs": 1, "node": "READY"}


@pytest.mark.parametrize(("name", "status", "done"), [("GNU tar", 1, 0), ("GNU tar", 2, 2), ("bsdtar", 1, 1)])
def test_tpu_vm_copies_files_that_change_meanwhile(box, name, status, done):
    """GNU tar's status 1 says that they did, that of others could be any error: the TPU would run half a copy."""
    (box / "script").write_text("0")
    stand_in(box, "gcloud", FAKE_GCLOUD)
    stand_in(box, "tar", f"print({name!r}) if argv == ['--version'] else sys.exit({status})")
    assert launch("tpu_vm.sh", *CLOUD).returncode == done
    assert any(call[4:5] == ["scp"] for call in calls(box)) == (done == 0)


def test_tpu_vm_copies_this_repository(box):
    (box / "script").write_text("0")
    stand_in(box, "gcloud", "argv[3] == 'scp' and Path(argv[4]).rename('archive')\n" + FAKE_GCLOUD)
    assert launch("tpu_vm.sh", *CLOUD).returncode == 0
    names = subprocess.run(["tar", "-tzf", "archive"], capture_output=True, text=True, check=True).stdout.split("\n")
    assert {"./pyproject.toml", "./research/main.py", "./experiments/sft.py"} <= set(names)


# SkyPilot


@pytest.mark.parametrize(("platform", "nodes"), [("cpu", 1), ("gpu", 2), ("tpu", 2)])
def test_skypilot_task_starts_each_node(box, platform, nodes):
    stand_in(box, "sky", "")
    arguments = ("BUCKET=gs://b", f"PLATFORM={platform}", f"NODES={nodes}", "ACCELERATORS=H100:8", "SPOT=0")
    assert launch("skypilot.sh", *arguments).returncode == 0
    (call,) = calls(box)
    assert call[:3] == ["sky", "jobs", "launch"]
    assert {f"--num-nodes={nodes}", "--gpus=H100:8", "--no-use-spot", "--env=BUCKET=gs://b"} <= set(call)
    given = dict(word.removeprefix("--env=").split("=", 1) for word in call if word.startswith("--env="))

    task = yaml.safe_load(Path(call[-1]).read_text())
    assert set(task["envs"]) == set(given)
    assert task["file_mounts"]["/mnt/runs"]["source"] == "${BUCKET}"
    assert not {0, 1, 2, 3} & set(task["resources"]["job_recovery"]["recover_on_exit_codes"])
    assert {75, 76, 137} <= set(task["resources"]["job_recovery"]["recover_on_exit_codes"])

    (box / "venv/bin").mkdir(parents=True)
    stand_in(box, "python", "print(json.dumps([argv, dict(os.environ)]))")
    (box / "bin/python").rename(box / "venv/bin/python")
    node = {"SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    run = subprocess.run(
        ["bash", "-c", task["run"]], env=os.environ | given | node | {"HOME": str(box)}, capture_output=True, text=True
    )
    argv, environment = json.loads(run.stdout)
    assert argv == ["-u", "-m", "research.main", *RUN]
    jax = {name: environment.get(name) for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")}
    assert list(jax.values()) == (["10.0.0.1:8476", "2", "1"] if platform == "gpu" else [None] * 3)
    assert (environment.get("JAX_NUM_CPU_DEVICES") == "1") == (platform == "cpu")


# All shell


def test_shell_is_clean(box):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    for part in ("setup", "run"):
        (box / f"{part}.sh").write_text("#!/usr/bin/env bash\n" + task[part])
    scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), *box.glob("*.sh")]
    assert len(scripts) == 7
    checked = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
