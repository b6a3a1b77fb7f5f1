"""Everything a user may get wrong: the error names it and the remedy, and nothing is written.

Each case is a command line of research.main, and words that the error must hold.
"""

import gzip
import json
import shutil
from pathlib import Path

import pytest

from research import main
from research.errors import Exit
from research.run import checkpoint

SFT, PRETRAIN = "--config=experiments/sft.py:debug", "--config=experiments/pretrain.py:debug"
FINETUNE = "--config=experiments/finetune.py"
TINY = str(Path(__file__).parent / "golden/hf_tiny/llama")
GOOD = json.dumps({"prompt": "a", "response": "b"})


def c(field, value):
    return f"--config.{field}={value}"


# name -> (arguments, words of the error); DIR is a folder with the files below.
CASES = {
    "no config": ([], ["--config", "experiments/sft.py"]),
    "missing experiment": (
        ["--config=experiments/sftt.py"],
        ["experiments/sftt.py", "Did you mean 'experiments/sft.py'"],
    ),
    "unknown variant": (["--config=experiments/sft.py:debgu"], ["debgu", "Did you mean 'debug'"]),
    "typo in a field": (
        [SFT, c("optimizer.learning_rat", 1)],
        ["optimizer.learning_rat", "Did you mean 'optimizer.learning_rate'"],
    ),
    "typo in a section": ([SFT, c("optimiser.name", "sgd")], ["optimiser", "Did you mean 'optimizer.name'"]),
    "typo in a flag": ([SFT, "--workdr=x"], ["workdr", "workdir"]),
    "not a number": ([SFT, c("steps", "many")], ["--config.steps", "many"]),
    "answers longer than the model": ([SFT, c("eval.max_new_tokens", 5000)], ["max_new_tokens = 5000"]),
    "zero steps": ([SFT, c("steps", 0)], ["steps = 0", "at least 1"]),
    "unknown objective": (["--config=DIR/objective.py"], ["objective.terms.nex_token", "Did you mean 'next_token'"]),
    "unknown option of an objective": (["--config=DIR/option.py"], ["objective.sft.smoothing", "label_smoothing"]),
    "batch not divisible by microbatches": (
        [SFT, c("batch_size", 9), c("microbatches", 2)],
        ["batch_size = 9", "microbatches"],
    ),
    "batch not divisible by the mesh": ([SFT, c("batch_size", 12)], ["batch_size = 12", "mesh.data", "16"]),
    "mesh larger than the machine": ([SFT, c("mesh.data", 16)], ["data=16", "16 devices", "there are 8", "-1"]),
    "mesh that doesn't divide": ([SFT, c("mesh.tensor", 3)], ["tensor=3", "8 devices"]),
    "sequence that the mesh doesn't divide": (
        [SFT, c("seq_len", 100), c("mesh.data", 1), c("mesh.sequence", 8)],
        ["seq_len = 100", "mesh.sequence = 8"],
    ),
    "unknown mesh axis in a rule": (["--config=DIR/rule.py"], ["rules.embed", "fdsp", "Did you mean 'fsdp'"]),
    "more than the machine holds": (
        [SFT, c("model.d_model", 65536), c("model.d_ff", 262144), c("model.num_layers", 400)],
        [
            "model.d_model = 65,536, model.num_layers = 400, model.d_ff = 262,144",
            "GB on each device",
            "understudy plan",
        ],
    ),
    "processes without a coordinator": ([SFT, "--process_id=1"], ["--process_id", "--coordinator=HOST:PORT"]),
    "process beyond the number": (
        [SFT, "--coordinator=localhost:1", "--num_processes=2", "--process_id=2"],
        ["process 2 of 2", "--process_id"],
    ),
    "coordinator without a port": (
        [SFT, "--coordinator=localhost", "--num_processes=2", "--process_id=0"],
        ["--coordinator=localhost", "no port"],
    ),
    "heads not divisible by key/value heads": (
        [SFT, c("model.num_kv_heads", 3)],
        ["model.num_kv_heads = 3", "model.num_heads = 4"],
    ),
    "width not divisible by heads": (
        [SFT, c("model.num_heads", 6)],
        ["model.d_model = 64", "model.num_heads = 6", "model.head_dim"],
    ),
    "heads not divisible by the mesh": (
        [SFT, c("mesh.data", 1), c("mesh.tensor", 8)],
        ["heads", "size 2", "mesh tensor = 8", "mesh.tensor"],
    ),
    "sequence longer than the model": ([SFT, c("model.max_length", 64)], ["seq_len = 128", "model.max_length = 64"]),
    "vocabulary smaller than the tokenizer": ([SFT, c("model.vocab_size", 100)], ["model.vocab_size = 100", "261"]),
    "unknown activation": ([SFT, c("model.mlp", "swigl")], ["model.mlp = 'swigl'", "Did you mean 'swiglu'"]),
    "unknown remat policy": ([SFT, c("model.remat", "ful")], ["model.remat = 'ful'", "Did you mean 'full'"]),
    "unknown attention": ([SFT, c("model.attention", "flash")], ["model.attention = 'flash'", "Did you mean 'splash'"]),
    "unknown optimizer": ([SFT, c("optimizer.name", "adamv")], ["optimizer.name", "Did you mean 'adamw'"]),
    "unknown schedule": ([SFT, c("optimizer.schedule", "cos")], ["optimizer.schedule", "cosine"]),
    "warm-up longer than the run": ([SFT, c("optimizer.warmup_steps", 50)], ["optimizer.warmup_steps", "50"]),
    "negative learning rate": ([SFT, c("optimizer.learning_rate", -1.0)], ["optimizer.learning_rate", "-1"]),
    "best by no metric": ([SFT, c("eval.every", 0)], ["checkpoint.best_metric", "eval.every = 0"]),
    "missing data file": (
        [SFT, c("data.path", "DIR/god.jsonl")],
        ["data.path", "god.jsonl", "Did you mean", "good.jsonl"],
    ),
    "unknown task": ([SFT, c("data.path", "tasks:revers")], ["revers", "Did you mean 'reverse'"]),
    "unknown ending": ([SFT, c("data.path", "DIR/data.xlsx")], ["data.xlsx", "jsonl"]),
    "broken JSON": ([SFT, c("data.path", "DIR/broken.jsonl")], ["broken.jsonl:2", "JSON", "on_bad_record"]),
    "missing field": ([SFT, c("data.path", "DIR/field.jsonl")], ["field.jsonl:2", "response", "on_bad_record"]),
    "wrong type": ([SFT, c("data.path", "DIR/type.jsonl")], ["type.jsonl:2", "prompt", "on_bad_record"]),
    "empty response": ([SFT, c("data.path", "DIR/empty.jsonl")], ["empty.jsonl:2", "response", "on_bad_record"]),
    "unknown role": ([SFT, c("data.path", "DIR/role.jsonl")], ["role.jsonl:1", "asistant", "Did you mean 'assistant'"]),
    "invalid UTF-8": ([SFT, c("data.path", "DIR/latin.jsonl")], ["latin.jsonl:2", "UTF-8"]),
    "empty file": ([SFT, c("data.path", "DIR/nothing.jsonl")], ["nothing.jsonl", "no "]),
    "truncated gzip": ([SFT, c("data.path", "DIR/cut.jsonl.gz"), c("data.max_records", 0)], ["cut.jsonl.gz"]),
    "weights for some of a mixture": (
        [SFT, c("data.path", "0.5*DIR/good.jsonl,tasks:reverse")],
        ["data.path", "weight"],
    ),
    "everything too long": ([SFT, c("data.path", "DIR/long.jsonl")], ["longer than", "seq_len"]),
    "nothing held out": (
        [SFT, c("data.path", "DIR/good.jsonl")],
        ["nothing is held out", "all records ask the same", "Give more data", "eval.every = 0"],
    ),
    "one document": (
        [SFT, c("data.path", "DIR/README.txt")],
        ["nothing is held out", "there is one record; a .txt becomes one for each 16 KiB"],
    ),
    "nothing to be held out": (
        [SFT, c("data.eval_fraction", 0.0)],
        ["nothing is held out", "data.eval_fraction = 0", "Raise it"],
    ),
    "a folder of several kinds": ([SFT, c("data.path", "DIR")], ["files of several kinds", "DIR/**/*.jsonl"]),
    "a comma in a path": (
        [SFT, c("data.path", "DIR/comma,name.jsonl")],
        ["there is no 'DIR/comma'", "A comma parts entries", "data.sources={'NAME': {'path': 'DIR/comma,name.jsonl'}}"],
    ),
    "unknown format": ([SFT, c("data.format", "chatt")], ["data.format", "chatt"]),
    "unknown template": ([SFT, c("data.template", "chatml")], ["data.template", "chatml", "chat"]),
    "missing tokenizer": ([SFT, c("tokenizer.kind", "DIR/tokenizer.json")], ["tokenizer", "DIR/tokenizer.json"]),
    "init_from without a checkpoint": (
        [SFT, c("model.init_from", "DIR")],
        ["DIR: holds no config.json", "save_pretrained"],
    ),
    "init_from of another shape": (
        [SFT, c("model.init_from", "RUN"), c("model.d_ff", 192)],
        ["model.d_ff = 192", "RUN, has 128", "model.init_from"],
    ),
    "negative seed": ([SFT, c("seed", -1)], ["seed = -1", "in [0, 4294967295]"]),
    "seed of 67 bits": ([SFT, c("seed", 10**20)], ["seed = 100000000000000000000", "32 bits"]),
    "number of many digits": ([SFT, c("data.examples", "9" * 500)], ["data.examples", "32 bits"]),
    "classifier that is to learn tokens": (
        [SFT, c("model.num_labels", 2), c("eval.generate", 0)],
        ["model.num_labels = 2", "classify"],
    ),
    "classes of data without labels": (
        [SFT, c("data.num_classes", 2)],
        ["data.num_classes = 2: has no effect", "data.format to 'labelled'"],
    ),
    "encoder that is to learn the next token": (
        [SFT, c("model.causal", False), c("objective", "{'terms': {'next_token': 1.0}}"), c("eval.generate", 0)],
        ["model.causal = False", "reads in both directions", "Use a causal model"],
    ),
    "encoder that is to learn answers": (
        [SFT, c("model.causal", False), c("eval.generate", 0)],
        ["model.causal = False", "reads in both directions"],
    ),
    "encoder that is to be a student": (
        [
            *(SFT, c("model.causal", False), c("objective", "{'terms': {'distill': 1.0}}"), c("eval.generate", 0)),
            c("roles", "{'teacher': {'init_from': 'RUN'}}"),
        ],
        ["model.causal = False", "reads in both directions"],
    ),
    "teacher with a head of classes": (
        [
            SFT,
            c("objective", "{'terms': {'distill': 1.0}}"),
            c("roles", "{'teacher': {'of': 'policy', 'num_labels': 4}}"),
        ],
        ["roles.teacher.num_labels = 4", "classes"],
    ),
    "role that follows none": (
        [
            SFT,
            c("objective", "{'terms': {'distill': 1.0}}"),
            c("roles", "{'teacher': {'init_from': 'RUN', 'sync_every': 3}}"),
        ],
        ["roles.teacher.sync_every = 3: follows no role", "roles.teacher.of = 'policy'"],
    ),
    "role that never moves": (
        [
            SFT,
            c("objective", "{'terms': {'distill': 1.0}}"),
            c("roles", "{'teacher': {'of': 'policy', 'sync_weight': 0.5}}"),
        ],
        ["roles.teacher.sync_weight = 0.5", "Set roles.teacher.sync_every"],
    ),
    "encoder that is to answer": ([SFT, c("model.causal", False)], ["eval.generate = ", "an encoder", "Set it to 0"]),
    "classifier that is to answer": (
        [SFT, c("model.num_labels", 2), c("eval.generate", 0), c("rollout.share", 0.5), c("data.pack", False)],
        ["rollout.share = 0.5: the policy is a classifier of 2 classes", "Set it to 0"],
    ),
    "nothing to fine-tune": ([FINETUNE], ["--config.model.init_from: is missing"]),
    "nothing to fine-tune, in the debug form": ([FINETUNE + ":debug"], ["--config.model.init_from: is missing"]),
    "init_from a model of another shape": (
        [SFT, c("model.init_from", "TINY"), c("model.num_layers", 3)],
        ["model.num_layers = 3", "TINY, has 2"],
    ),
    "debug form with a model that exists, but for its tokenizer": (
        [SFT, c("model.init_from", "TINY"), c("seq_len", 32), c("tokenizer.kind", "auto")],
        ["TINY: comes without a tokenizer", "tokenizer.json"],
    ),
    "init_from a model without a tokenizer": (
        [FINETUNE, c("model.init_from", "TINY"), c("seq_len", 32)],
        ["TINY: comes without a tokenizer", "tokenizer.json"],
    ),
    "init_from a model that another tokenizer doesn't fit": (
        [FINETUNE, c("model.init_from", "TINY"), c("seq_len", 32), c("tokenizer.kind", "byte")],
        ["model.vocab_size = 96", "261"],
    ),
    "init_from a model that is shorter than the rows": (
        [FINETUNE, c("model.init_from", "TINY")],
        ["seq_len = 256", "model.max_length = 64"],
    ),
}

EXPERIMENT = (
    "from experiments import base\ndef get_config():\n    c = base.get_config()\n    c.objective = {}\n    return c\n"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of faulty files."""
    folder = tmp_path_factory.mktemp("files")
    lines = {
        "good": [GOOD] * 3,
        "broken": [GOOD, '{"prompt": "a", "resp'],
        "field": [GOOD, '{"prompt": "a"}'],
        "type": [GOOD, '{"prompt": 3, "response": "b"}'],
        "empty": [GOOD, '{"prompt": "a", "response": ""}'],
        "role": ['{"messages": [{"role": "user", "content": "a"}, {"role": "asistant", "content": "b"}]}'],
        "nothing": [],
        "long": [json.dumps({"prompt": f"{i} " + "a" * 500, "response": "b"}) for i in range(4)],
    }
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(row + "\n" for row in rows))
    (folder / "latin.jsonl").write_bytes(GOOD.encode() + b'\n{"prompt": "\xe9", "response": "b"}\n')
    (folder / "data.xlsx").write_bytes(b"PK")
    (folder / "README.txt").write_text("about the files")
    (folder / "comma,name.jsonl").write_text(GOOD)
    (folder / "cut.jsonl.gz").write_bytes(
        gzip.compress("\n".join(f'{{"prompt": "{i}", "response": "b"}}' for i in range(999)).encode())[:-40]
    )
    for name, objective in (
        ("objective", {"terms": {"nex_token": 1.0}}),
        ("option", {"terms": {"sft": 1.0}, "sft": {"smoothing": 0.1}}),
    ):
        (folder / f"{name}.py").write_text(EXPERIMENT.replace("{}", repr(objective)))
    rule = EXPERIMENT.replace("c.objective = {}", "c.rules = {'embed': 'fdsp'}")
    (folder / "rule.py").write_text(rule)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    assert main.main([SFT, f"--workdir={workdir}"]) == 0
    return workdir


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_named_and_nothing_is_written(case, files, request, tmp_path, capfd):
    arguments, words = CASES[case]
    if any("RUN" in a for a in arguments):
        arguments = [a.replace("RUN", str(request.getfixturevalue("trained"))) for a in arguments]
    arguments = [a.replace("DIR", str(files)).replace("TINY", TINY) for a in arguments]
    workdir = tmp_path / "work"
    capfd.readouterr()
    assert main.main([*arguments, f"--workdir={workdir}"]) == Exit.BAD_INPUT
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert error.startswith("error: ") or "\nerror: " in error
    for word in words:
        assert word.replace("DIR", str(files)).replace("TINY", TINY).replace("RUN", "run") in error, error
    assert not workdir.exists()


def test_a_damaged_checkpoint_is_named_and_left_alone(trained, tmp_path, capfd):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    newest = workdir / checkpoint.FOLDER / "2"
    for file in (newest / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*.json*")}
    assert main.main([SFT, f"--workdir={workdir}", c("steps", 3)]) == Exit.BAD_INPUT
    error = capfd.readouterr().err
    assert "damaged" in error
    assert str(newest) in error
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*.json*")} == before
    shutil.rmtree(newest)
    assert main.main([SFT, f"--workdir={workdir}"]) == 0  # the remedy that the error names


def test_resuming_with_another_model_or_optimizer_says_so(trained, capfd):
    for flag, words in (
        (c("model.d_model", 32), ["model.d_model = 64 -> 32: can't change", f"model.init_from={trained} "]),
        (c("optimizer.name", "lion"), ["optimizer.name = ", "-> 'lion': can't change", "optimizer's state"]),
    ):
        assert main.main([SFT, f"--workdir={trained}", c("steps", 4), flag]) == Exit.BAD_INPUT
        error = capfd.readouterr().err
        assert all(word in error for word in words), error
        assert "Traceback" not in error
