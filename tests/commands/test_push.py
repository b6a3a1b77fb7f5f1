"""What is pushed to the hub arrives there with its card. The hub is a fake of its API, in the process of the test."""

import base64
import http.server
import json
import shutil
import threading
from pathlib import Path

import goldens
import huggingface_hub.constants
import pytest
import safetensors.numpy

from research.commands import export
from research.loading import card
from research.sources.tokenizers import TokenizerSpec, make_tokenizer

RUN = Path(goldens.__file__).parent / "golden/runs/trained"
LLAMA = Path(goldens.__file__).parent / "golden/hf_tiny/llama"


class _Handler(http.server.BaseHTTPRequestHandler):
    """The routes by which huggingface_hub uploads small files (its API of commits)."""

    def do_GET(self):
        hub = self.server.hub
        known = self.headers.get("Authorization") == "Bearer hf_right"
        if self.path == "/api/whoami-v2":
            self._reply({"name": "me", "orgs": []} if known else {"error": "Invalid"}, 200 if known else 401)
        else:
            name = self.path.removeprefix("/api/models/").partition("/revision")[0]
            self._reply({"id": name, "sha": "0" * 40, "siblings": []}, 200 if name in hub["repositories"] else 404)

    def do_POST(self):
        hub = self.server.hub
        lines = self.rfile.read(int(self.headers["Content-Length"])).splitlines()
        if self.path == "/api/repos/create":
            asked = json.loads(lines[0])
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            if asked["organization"] not in (None, "me"):
                self._reply({"error": "You don't have the rights to create a model under this namespace"}, 403)
                return
            hub["repositories"][name] = asked
            self._reply({"url": f"{hub['url']}/{name}", "id": name})
        elif self.path == "/api/validate-yaml":
            self._reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(lines[0])["files"]]
            self._reply({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, lines):
                if line["key"] == "file":
                    value = line["value"]
                    hub["files"][value["path"]] = base64.b64decode(value["content"])
            self._reply({"success": True, "commitOid": "1" * 40, "commitUrl": f"{hub['url']}/me/x/commit/{'1' * 40}"})
        else:
            self._reply({"error": self.path}, 404)

    def _reply(self, body, status=200):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    """The fake hub: {"repositories": name -> what it was made with, "files": path -> content}."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = {"repositories": {}, "files": {}, "url": f"http://127.0.0.1:{server.server_address[1]}"}
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.hub["url"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield server.hub
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run, with two evaluations."""
    folder = tmp_path_factory.mktemp("push") / "run"
    shutil.copytree(RUN, folder)
    lines = [
        {"step": 0, "eval/loss": 5.5, "train/loss": 5.6},
        {"step": 20, "eval/loss": 3.25},
        {"step": 30, "train/loss": 3},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3')
    return folder


@pytest.mark.slow
def test_a_run_is_pushed_with_its_card(hub, run, capsys):
    assert export.main([f"--model={run}", "--push=me/mine", "--private", "--license=apache-2.0"]) == 0
    assert f"{hub['url']}/me/mine" in capsys.readouterr().err
    asked = hub["repositories"]["me/mine"]
    assert asked.get("visibility") == "private" or asked.get("private") is True
    files = hub["files"]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert safetensors.numpy.load(files["model.safetensors"])
    front, text = files["README.md"].decode().split("---\n", 2)[1:]
    assert 'license: "apache-2.0"' in front
    assert 'library_name: "transformers"' in front
    assert "# mine\n" in text
    assert "`tasks:copy,tasks:reverse,tasks:upper,tasks:sort_letters" in text
    assert "30 steps of 4 rows of 64 tokens: at most 7,680 tokens." in text
    assert "optimizer.learning_rate: 0.01" in text
    assert "| loss | 5.5 | 3.25 |" in text
    assert "step 0 | step 20" in text


def test_the_card_has_the_licence_of_the_base_and_no_folders_of_this_machine(tmp_path):
    base, run = tmp_path / "base", tmp_path / "secret" / "run"
    shutil.copytree(LLAMA, base)
    shutil.copytree(RUN, run)
    about = json.loads((run / "config.json").read_text())
    about["config"]["model"]["init_from"] = str(base)
    about["config"]["data"]["path"] = f"hf:owner/set,{tmp_path}/secret/mine.jsonl,builtin:stdlib"
    (run / "config.json").write_text(json.dumps(about))
    assert card.trace(str(run)) == card.Origin(str(base), "")
    (base / "README.md").write_text("---\nlanguage: en\nlicense: 'mit'\n---\n# Base\nlicense: no\n")
    origin = card.trace(str(run))
    assert origin == card.Origin(str(base), "mit")
    text = card.write(str(run), "me/mine", origin)
    assert 'license: "mit"' in text
    assert "`mit`, that of base." in text
    assert "`hf:owner/set,mine.jsonl,builtin:stdlib`" in text
    assert str(tmp_path) not in text
    assert "secret" not in text
    assert "model.init_from: base" in text
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: own-1\n---\n")
    assert card.trace(str(run)).license == "own-1"
    then = tmp_path / "then"  # a run that goes on from that run
    shutil.copytree(RUN, then)
    about["config"]["model"]["init_from"] = str(run)
    (then / "config.json").write_text(json.dumps(about))
    assert card.trace(str(then)) == card.Origin(str(base), "own-1")
    adapter = card.write(str(then), "me/mine", card.Origin("owner/base", "mit"), license="cc0-1.0", peft=True)
    assert 'base_model: "owner/base"\nlibrary_name: "peft"' in adapter
    assert "`cc0-1.0`; from owner/base." in adapter


def test_what_cannot_be_pushed_is_said_before_it_is_made(hub, run, tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(export, "_export", made.append)

    def fault(*flags, status=2):
        assert export.main([f"--model={run}", *flags]) == status
        return capsys.readouterr().err

    assert "--push = a b: isn't the name of a model on the hub. Write OWNER/MODEL." in fault("--push=a b")
    assert "--private: is of --push, which isn't given." in fault("--output=x", "--private")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "--push = me/x: the hub has no token that it knows. Run `hf auth login`" in fault("--push=me/x")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "--push = me/x: the hub can't be had (" in fault("--push=me/x", status=76)
    folder = tmp_path / "llama"
    shutil.copytree(LLAMA, folder)
    make_tokenizer(TokenizerSpec("byte"), lambda: iter(())).save(folder)
    assert export.main([f"--model={folder}", "--push=me/x"]) == 2
    assert f"the licence of {folder}, which this began with, isn't known" in capsys.readouterr().err
    assert made == []


def test_a_repository_of_others_is_refused(hub, run, tmp_path, capsys):
    output = tmp_path / "out"
    assert export.main([f"--model={run}", "--push=them/x", f"--output={output}"]) == 2
    assert "--push = them/x: the hub refuses it (" in capsys.readouterr().err
    assert (output / "README.md").is_file()
