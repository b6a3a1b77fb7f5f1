"""What holds for every command: help, errors of flags, exit statuses, and that a command is one file."""

import dataclasses
import functools
import importlib
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Mapping
from pathlib import Path

import jax
import pytest

from research import cli, commands, config, console, files, signals
from research.bench import names as bench_names
from research.bench import parts
from research.cli.command import TOP_FIELDS
from research.devices import startup
from research.errors import MAPPINGS, Exit, InputError
from research.evals.scoring import BATCH_TOKENS
from research.sources.formats import TEMPLATES

NAMES = cli.names()
DOCS = Path(__file__).parents[2] / "docs/commands.md"


def load(name):
    return importlib.import_module(f"research.commands.{name}")


@pytest.fixture
def run(capsys):
    """Command line -> status, stdout, stderr."""

    def run(*argv):
        status = cli.main(argv)
        captured = capsys.readouterr()
        said = [line for line in captured.err.splitlines() if not line.startswith("... ")]  # what isn't progress
        assert len(said) <= 1, captured.err
        assert said == captured.err.splitlines()[-1:], captured.err
        return status, captured.out, captured.err

    return run


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_every_flag_with_its_default_and_an_example(name, run):
    status, out, err = run(name, "--help")
    assert (status, err) == (0, "")
    command = load(name).COMMAND
    flags = out.split("\nFlags:\n")[1].split("\n\nExample")[0]
    blocks = re.split(r"\n  (?=--)", "\n" + flags)[1:]
    assert len(blocks) == len(command.flags) + command.experiment
    for block in blocks:
        assert re.search(r"Required\.|Default: \S", " ".join(block.split())), block
    assert out.split("\nFlags:\n")[0].startswith(cli.summary(name))
    assert f"\n  understudy {name} --" in out.split("\nExample")[1]


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_command_lines_that_can_be_read(name):
    for example in load(name).COMMAND.examples:
        words = shlex.split(example)
        assert words[:2] == ["understudy", name]
        load(name).COMMAND.parse(words[2:])


@pytest.mark.parametrize("name", NAMES)
def test_a_misspelt_flag_names_the_nearest(name, run):
    flag = next(flag for flag in load(name).COMMAND.flags if len(flag.name) > 3)
    misspelt = flag.name[:-2] + flag.name[-1] + flag.name[-2] if flag.name[-1] != flag.name[-2] else flag.name + "x"
    status, out, err = run(name, f"--{misspelt}=1")
    assert (status, out) == (2, "")
    assert err == f"error: --{misspelt}: no such flag. Did you mean '--{flag.name}'?\n"


@pytest.mark.parametrize("name", [name for name in NAMES if load(name).COMMAND.experiment])
def test_a_misspelt_config_or_field_names_the_nearest(name, run):
    assert "--confg: no such flag. Did you mean '--config'?" in run(name, "--confg=experiments/sft.py")[2]
    required = [f"--{flag.name}=x" for flag in load(name).COMMAND.flags if flag.required]
    status, _, err = run(name, "--config=experiments/sft.py:debug", "--config.step=5", *required)
    assert (status, err) == (2, "error: --config.step=5: no such field 'step'. Did you mean 'steps'?\n")
    status, _, err = run(name, "--config=experiments/sftt.py", *required)
    assert (status, "Did you mean 'experiments/sft.py'?" in err) == (2, True)
    assert "config.steps=5: flags begin with two dashes. Write --config.steps=5.\n" in run(name, "config.steps=5")[2]
    assert "Write --config=experiments/sft.py.\n" in run(name, "-config=experiments/sft.py")[2]
    assert (
        "is no flag. Flags have the form --name=value: write --config=experiments/sft.py.\n"
        in (run(name, "experiments/sft.py")[2])
    )


@pytest.mark.parametrize("name", NAMES)
def test_missing_flags_are_named_with_an_example(name, run):
    command = load(name).COMMAND
    required = ["config"] * command.experiment + [flag.name for flag in command.flags if flag.required]
    for given in required if len(required) > 1 else ():
        value = {"config": "experiments/sft.py:debug", "keep": "top"}.get(given, "x:1")
        said = run(name, f"--{given}={value}")[2].partition(" missing")[0]
        left = [f"--{flag}" for flag in required if flag != given]
        assert said == f"error: {', '.join(left)}: {'is' if len(left) == 1 else 'are'}"
    status, _, err = run(name) if required else (2, "", "")
    assert status == 2
    assert all(f"--{flag}" in err for flag in required)
    assert not required or f"missing. Example: understudy {name} " in err


@pytest.mark.parametrize("name", NAMES)
def test_one_thing_has_one_name(name, run):
    """A former name is an error that says the present one; flags of several commands mean the same."""
    command = load(name).COMMAND
    known = {flag.name for flag in command.flags}
    for old, new in command.renamed.items():
        assert new in known
        assert run(name, f"--{old}=x")[2] == f"error: --{old}: is called --{new} now. Write --{new}=x.\n"
    assert not known & {"input", "out", "checkpoint", "prompts", "json", "limit", "batch", "outdir", "num_records"}


def test_single_dashes_positional_words_and_flags_without_a_value(run):
    assert "-data=x: flags begin with two dashes. Write --data=x.\n" in run("split", "-data=x")[2]
    assert (
        "x.jsonl: is no flag. Flags have the form --name=value: write --data=x.jsonl.\n" in run("split", "x.jsonl")[2]
    )
    assert "-x=1: isn't of the form --name=value." in run("split", "-x=1")[2]
    assert "--data: has no value. Write --data=DATA.\n" in run("split", "--data")[2]
    for seed in ("many", "-1", "1e9"):
        assert f"--seed = {seed}: must be a whole number, at least 0.\n" in run("split", f"--seed={seed}")[2]
    assert f"must be a whole number, at most {2**32 - 1}.\n" in run("generate", f"--seed={10**20}")[2]
    assert "must be a whole number, at least 1.\n" in run("generate", f"--batch_size={'9' * 5000}")[2]
    assert f"must be a whole number, at most {2**31 - 1}.\n" in run("generate", f"--batch_size={'9' * 50}")[2]
    for value in ("nan", "inf", "-inf"):
        assert f"--temperature = {value}: must be a finite number.\n" in run("generate", f"--temperature={value}")[2]
    assert "--template = caht: no such choice. Did you mean 'chat'?\n" in run("score", "--template=caht")[2]
    for flag in ("--tokens=2.5", "--records=1.5"):
        said = run("select", "--scores=x", "--keep=random", "--output=y", flag)[2]
        assert f"{flag.replace('=', ' = ')}: must be a whole number, or up to 1, where it is a share.\n" in said
    assert "--verified=perhaps" not in run("filter", "--verified=true")[2]
    assert "--verified = perhaps: must be true or false.\n" in run("filter", "--verified=perhaps")[2]


def test_flags_are_read_in_both_forms():
    parse = load("generate").COMMAND.parse
    args = parse(["--model", "m", "--prompt=a=b", "--temperature", "-1", "--ema", "--stop=x", "--stop", "y"])
    assert (args.model, args.prompt, args.temperature, args.ema, args.stop) == ("m", "a=b", -1.0, True, ["x", "y"])
    assert parse(["--model=m", "--ema", "--noema"]).ema is False
    assert parse(["--model=m", "--step=best"]).step == "best"
    assert parse(["--model=m"]).stop == []


def test_an_experiment_has_its_overrides():
    args = load("train").COMMAND.parse(["--config=experiments/sft.py:debug", "--config.steps", "7", "--workdir=x"])
    assert args.experiment.config.steps == 7
    assert args.experiment.path == "experiments/sft.py"
    assert args.experiment.texts == {"steps": "7"}
    assert args.experiment.flags == ("--config=experiments/sft.py:debug", "--config.steps=7")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (InputError("data.path: is\n  missing"), 2, "error: data.path: is missing\n"),
        (KeyboardInterrupt(), 130, "interrupted: the same command goes on\n"),
        (PermissionError(13, "Permission denied", "/x"), 1, "error: /x: Permission denied.\n"),
    ],
)
def test_how_a_command_ends(error, status, said, capsys):
    def work():
        raise error

    assert cli.finish(work, resumable=True) == status
    assert capsys.readouterr().err == said
    assert cli.finish(lambda: None) == Exit.DONE == 0


def test_all_commands_are_listed(run):
    for argv in ((), ("--help",)):
        status, out, _ = run(*argv)
        assert status == 0
        listed = dict(re.findall(r"^  (\w+) +(\S.*)$", out, re.MULTILINE))
        assert sorted(listed) == NAMES
        assert all(listed[name].endswith(".") for name in NAMES)
    assert "Others:" not in out
    assert "sore: no such command. Did you mean 'score'?" in run("sore")[2]
    assert "Write: understudy train --config=experiments/sft.py" in run("experiments/sft.py")[2]
    assert "Write: understudy train --config=experiments/sft.py" in run("--config=experiments/sft.py")[2]


def test_a_command_is_one_file(tmp_path, run, monkeypatch):
    (tmp_path / "count.py").write_text(
        '"""Counts the lines of a file."""\n'
        "from research import cli\n"
        "from research.cli import Flag\n"
        'COMMAND = cli.Command("count", __doc__, (Flag("data", "the file", required=True),), ("understudy count",))\n'
        "def main(argv):\n"
        "    return COMMAND.run(argv, lambda args: print(len(open(args.data).readlines())))\n"
    )
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "research.commands.count", raising=False)
    assert "Others:\n  count      Counts the lines of a file." in run()[1]
    assert run("count", f"--data={tmp_path / 'count.py'}") == (0, "6\n", "")
    assert "--data: is missing" in run("count")[2]
    del commands.count, sys.modules["research.commands.count"]


def test_commands_that_train_prepare_their_process(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(startup, "leave_loops", lambda: calls.append("loops"))
    monkeypatch.setattr(startup, "use_huge_pages", lambda: calls.append("pages"))
    monkeypatch.setattr(console, "steady", lambda output: None)
    for name in ("hold", "begin", "end"):
        monkeypatch.setattr(signals, name, functools.partial(calls.append, name))
    for name in NAMES:
        monkeypatch.setattr(sys, "argv", ["understudy", name, "--no_such_flag"])
        assert cli.console() == 2
        steps, runs = ["loops", "pages"] * (name in commands.STEPS), name in commands.RUNS
        assert calls == (["hold", *steps, "begin", "end"] if runs else steps)
        calls.clear()
    assert set(commands.STEPS) < set(NAMES)
    assert set(commands.RUNS) < set(NAMES)


def test_a_flag_that_is_a_field_says_how_fields_are_set(run):
    for flag, hint in (
        ("steps", "Did you mean 'steps'?"),
        ("num_layers", "Did you mean 'model.num_layers'?"),
        ("model.num_layers", "Did you mean 'model.num_layers'?"),
        ("lr", "Here it is optimizer.learning_rate."),
        ("qqqqq", "docs/configs.md lists them."),
    ):
        said = f"error: --{flag}: no such flag. Fields of the config are set by --config.FIELD=VALUE. {hint}\n"
        assert run("train", "--config=experiments/sft.py:debug", f"--{flag}=2") == (2, "", said)
    err = run("train", "--config=experiments/sft.py:debug", "--confg.model.num_layers=2")[2]
    assert err == "error: --confg.model.num_layers: no such flag. Did you mean '--config.model.num_layers'?\n"


def test_a_value_that_is_no_number_is_named_in_words(run):
    for flag, kind in (("steps", "whole number"), ("optimizer.learning_rate", "number")):
        err = run("train", "--config=experiments/sft.py:debug", f"--config.{flag}=abc")[2]
        assert err == f"error: --config.{flag}=abc: must be a {kind}.\n"


def test_the_console_script_finds_modules_of_the_folder_that_it_is_run_in(tmp_path):
    (tmp_path / "beside.py").write_text("")
    code = "import sys; sys.path.pop(0); from research import cli; cli.console(); import beside"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True)


def test_a_help_or_a_wrong_flag_imports_neither_jax_nor_numpy():
    code = "import sys; from research import cli; cli.main(sys.argv[1:]); sys.exit('jax' in sys.modules)"
    for name in NAMES:
        # A misspelt flag, and what others call a field; for other names the fields of the config are looked through.
        wrong = ["--hepl", "--max_steps=2", "--seq_len=2"] if load(name).COMMAND.experiment else ["--no_such_flag"]
        for flags in (["--help"], *([flag] for flag in wrong)):
            done = subprocess.run([sys.executable, "-c", code, name, *flags], capture_output=True, env=dict(os.environ))
            assert done.returncode == 0, (name, done.stderr)


def test_what_flags_say_is_what_there_is():
    """Values that the commands write down themselves, so as not to import what they come from."""
    assert cli.BATCH_TOKENS.default == BATCH_TOKENS
    assert [name for name, value in config.defaults().items() if not isinstance(value, dict)] == [*TOP_FIELDS]
    assert all(template in cli.TEMPLATE.help for template in TEMPLATES)
    for template in TEMPLATES:
        assert cli.TEMPLATE.parse(template) == template
    assert tuple(parts.PARTS) == bench_names.PARTS


@pytest.mark.parametrize("name", NAMES)
def test_the_docs_have_the_help(name):
    text = DOCS.read_text(encoding="utf-8")
    assert load(name).COMMAND.help() in text, f"docs/commands.md: write `understudy {name} --help` anew"


def test_the_docs_have_the_exit_statuses():
    text = DOCS.read_text(encoding="utf-8")
    for status in Exit:
        assert re.search(rf"^\| {status.value} \| {status.name} \|", text, re.MULTILINE), status


PATHS = ("DIR", "FILE", "FILE.json", "FOLDER", "MODEL", "MODEL[,MODEL]", "DATA")


@pytest.mark.parametrize("name", NAMES)
def test_the_home_folder_is_written_as_a_tilde(name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for flag in load(name).COMMAND.flags:
        if flag.metavar in PATHS:
            wanted = ("/home/me/x", "/home/me/y") if flag.metavar in ("MODEL[,MODEL]", "DATA") else "/home/me/x,~/y"
            assert flag.parse("~/x,~/y") == wanted, flag.name
            with pytest.raises(ValueError, match=r"there is no user 'no_such_user'. Write ./~no_such_user/x"):
                flag.parse("~no_such_user/x")


def test_an_experiment_is_known_by_its_name_from_any_folder(tmp_path, monkeypatch):
    here = Path(cli.EXPERIMENTS)
    for given in ("sft", "sft.py", "experiments/sft.py", "experiments/sft"):
        assert cli.read_experiment([f"--config={given}:debug"]).name == "experiments/sft.py:debug"
    monkeypatch.chdir(tmp_path)
    for given in ("sft", "sft.py", "experiments/sft.py"):
        experiment = cli.read_experiment([f"--config={given}:debug", "--config.steps=7"])
        assert (experiment.path, experiment.config.steps) == (str(here / "sft.py"), 7)
        assert experiment.flags == (f"--config={here / 'sft.py'}:debug", "--config.steps=7")
    (tmp_path / "sft.py").write_text((here / "pretrain.py").read_text())
    assert cli.read_experiment(["--config=sft"]).path == "sft.py"  # one's own goes before
    with pytest.raises(InputError, match="there is no file 'stf'"):
        cli.read_experiment(["--config=stf"])


def test_text_that_the_terminal_lacks_is_escaped(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.Command("show", "Shows.", (), ("show",)).run([], lambda args: print("é 日本")) == 0
    out.flush()
    assert out.buffer.getvalue() == b"\xe9 \\u65e5\\u672c\n"


def test_flags_that_are_no_text_are_refused(run):
    assert "isn't text in the encoding of this terminal" in run("generate", "--model=m", "--prompt=\udce9")[2]


def test_libtpu_is_left_alone_where_there_is_no_tpu(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for name in [name for name in os.environ if name.startswith("TPU_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(startup, "_has_tpu", lambda: False)
    startup.leave_tpus()
    assert os.environ.pop(startup.TPU_SWITCH) == "0"
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    startup.leave_tpus()
    assert startup.TPU_SWITCH not in os.environ
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(startup, "_has_tpu", lambda: True)
    startup.leave_tpus()
    assert startup.TPU_SWITCH not in os.environ


@pytest.mark.skipif(startup._has_tpu(), reason="there is a TPU")
def test_a_command_that_touches_devices_says_nothing_of_tpus(tmp_path):
    """With libtpu installed, where it is, jax would load it and print its error about worker hostnames."""
    code = (
        "import sys; from research import cli; import jax\n"
        "sys.exit(cli.Command('devices', 'Lists.', (), ('',)).run([], lambda args: print(jax.devices()[0].platform)))"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_PLATFORMS", "TPU_", "XLA_FLAGS"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_experiment_is_read_as_it_is_now(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = tmp_path / "x.py"
    for value in (1, 2):
        file.write_text(f"number = {value}\n")
        os.utime(file, (1_000_000, 1_000_000))
        assert cli.load_module(str(file)).number == value


SFT = "--config=experiments/sft.py:debug"
# Files of a user's own that Python can't run, or not to the end -> the one line that is said of it.
OWN_CODE = {
    "def get_config(:\n    return 1\n": ":1: SyntaxError: invalid syntax: def get_config(:",
    "x = 1\n\tif x:\n": ":2: IndentationError: unexpected indent: if x:",
    "import json\nraise json.nothing\n": ":2: AttributeError: module 'json' has no attribute 'nothing'",
    "import nosuchthing\n": ":1: ModuleNotFoundError: No module named 'nosuchthing'",
    "x = 1\0": ": SyntaxError: source code string cannot contain null bytes",
    "def f():\n    return {}['k']\ndef get_config(arg=''):\n    return f()\n": ":2: KeyError: 'k'",
    "def get_config(arg=''):\n    raise ValueError('a\\nb')\n": ":2: ValueError: a b",
    "def get_config(arg=''):\n    return open('/nowhere')\n": ":2: FileNotFoundError: [Errno 2] No such file",
    "from experiments import base\ndef get_config(arg=''):\n    c = base.get_config()\n    c.stepz = 1\n": (
        ":4: the config has no field 'stepz'. Did you mean 'steps'?"
    ),
    "from experiments.sft import *\ndef finish(config, variants, overrides):\n    1 / 0\n": (
        ":3: ZeroDivisionError: division by zero"
    ),
    "": "x.py: it defines no get_config()",
}


@pytest.mark.parametrize("source", OWN_CODE)
def test_faults_of_an_experiments_own_code_are_one_line(source, tmp_path, run):
    (tmp_path / "x.py").write_text(source)
    for command in (["train", f"--workdir={tmp_path / 'run'}"], ["sweep", f"--workdir={tmp_path / 'runs'}"]):
        status, _, err = run(command[0], f"--config={tmp_path / 'x.py'}", *command[1:])
        assert (status, err.count("\n")) == (2, 1), err
        assert OWN_CODE[source] in err, err
    assert {path.name for path in tmp_path.iterdir()} <= {"x.py", "__pycache__"}


def test_faults_of_an_own_objective_or_view_are_one_line(tmp_path, run, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "objective_of_mine.py").write_text("import json\ndef make(:\n")
    (tmp_path / "view_of_mine.py").write_text("import json\nimport nosuchthing\n")
    for field, line in (
        ("objective={'terms': {'objective_of_mine': 1.0}}", "objective_of_mine.py:2: SyntaxError: invalid syntax"),
        ("data.sources={'a': {'path': 'x', 'view': {'kind': 'view_of_mine'}}}", "view_of_mine.py:2: ModuleNotFoundErr"),
    ):
        flags = [SFT, "--config.data.path=", f"--config.{field}", f"--workdir={tmp_path / 'run'}"]
        status, _, err = run("train", *flags)
        assert (status, line in err) == (2, True), err
    assert not (tmp_path / "run").exists()


def test_faults_of_a_sweep_or_a_study_and_of_a_call_are_one_line(tmp_path, run):
    (tmp_path / "x.py").write_text("from experiments.sft import *\ndef sweep(add):\n    add(1 / 0)\n")
    assert "x.py:3: ZeroDivisionError" in run("sweep", f"--config={tmp_path / 'x.py'}", f"--workdir={tmp_path}/r")[2]
    text = "from experiments import base\ndef get_config(arg=''):\n    c = base.get_config()\n"
    text += "    with c.unlocked():\n        c.study = {}\n    return c\n"
    text += "def study(config, add):\n    raise OSError('no')\n"
    (tmp_path / "y.py").write_text(text)
    assert "y.py:8: OSError: no" in run("study", f"--config={tmp_path / 'y.py'}", f"--workdir={tmp_path}/r")[2]
    (tmp_path / "z.py").write_text("def get_config():\n    return 1\n")
    status, _, err = run("train", f"--config={tmp_path / 'z.py'}:debug")
    assert (status, err.count("\n")) == (2, 1)
    assert "z.py:debug: TypeError: get_config() takes 0 positional arguments but 1 was given" in err
    assert "is a folder. Name a file in it" in run("train", f"--config={tmp_path}")[2]


# Overrides of the config that can't be -> what their error says.
ODD_OVERRIDES = {
    "--config.rules.embed=tensor": (
        "rules.embed = 'tensor': an array has the axes vocab, embed, and 'vocab' is cut by mesh.tensor already "
        "(rules.vocab = 'tensor'). Cut one of them by another mesh axis, or by None."
    ),
    "--config.rules.embd=tensor": "rules.embd: no such logical axis. Did you mean 'embed'?",
    "--config.roles.teacher.init_from=x": (
        "roles.teacher.init_from: x: no such file or folder, and no hub name either (NAME/MODEL or NAME/MODEL@REVISION)"
    ),
    "--config.roles.teacher.init_form=x": "roles.teacher.init_form: no such field. Did you mean 'init_from'?",
    "--config.objective.sft.alpha=1": "objective.sft.alpha: no such option. Known: label_smoothing, z_loss.",
    "--config.rewards.mine=0.5": "rewards.mine: no module research/rollouts/rewards/mine.py, and no mine.py in the fol",
    "--config.rules.{}=3": "isn't of the form --config.FIELD=VALUE",
    "--config.=3": "isn't of the form --config.FIELD=VALUE",
    "--config.steps.=3": "isn't of the form --config.FIELD=VALUE",
    "--config..steps=3": "isn't of the form --config.FIELD=VALUE",
    "--config.steps[0]=3": "A part of a tuple or a mapping is set with the whole",
    "--config.\0=3": "isn't of the form --config.FIELD=VALUE",
    "--config.data.path=\0": "holds a zero byte",
    "--config.steps": "--config.steps: has no value. Write --config.steps=VALUE.",
    "--config.steps.x=3": "what is before the last dot is one value (int), and has no fields",
    "--config.a.b.c.d=1": "no such field 'a.b.c.d'. docs/configs.md lists the fields.",
    "--config.__class__=3": "no such field '__class__'",
    "--config.model=3": "must be a mapping as Python writes it",
    "--config.data.fields={'a':": "must be a mapping as Python writes it",
    "--config.model={}": "takes the place of the whole section, and lacks the field 'init_from'",
    "--config.data.pack=2": "must be True or False",
    "--noconfig": "isn't of the form --config.FIELD=VALUE",
    "--noconfig.steps": "config.steps isn't True or False",
    "--noconfig.data.pack=3": "is False without a value. Write --config.data.pack=3",
    "--config=experiments/pretrain.py": "names 2 experiments. Give one",
    "--config.optimizer.b1=nan": "optimizer.b1 = nan: must be a finite number",
    "--config.rules={3: 'x'}": "rules: has the name 3, and names are texts",
    "--config.data.fields={'prompt': 3}": "data.fields.prompt = 3: must be of type str",
    "--config.data.labels=('a', 'a')": "data.labels = ('a', 'a'): 'a' is there twice",
    "--config.plan.prices={'v9': 1.0}": "plan.prices.v9: no such chip",
    "--config.stall_seconds=-1": "stall_seconds = -1: must be at least 0",
    "--config.model.norm_eps=-1.0": "model.norm_eps = -1.0: must be at least 0",
    "--config.model.rope_theta=0.0": "model.rope_theta = 0.0: must be above 0",
    "--config.rollout.top_p=2.0": "rollout.top_p = 2.0: must be in (0, 1]",
    "--config.objective={'terms': 3}": "objective.terms = 3: must be a mapping",
    "--config.objective={'terms': {'sft': {'z_loss': 'a'}}}": "objective.terms.sft.z_loss = 'a': must be of type float",
    "--config.objective={'terms': {'sft': {'label_smoothing': 2}}}": "objective.terms.sft.label_smoothing = 2: must",
    "--config.objective={'terms': {'distill': {'teachers': 3}}}": "teachers = 3: must be of type mapping or None",
}


@pytest.mark.parametrize("override", ODD_OVERRIDES)
def test_odd_overrides_of_the_config_are_one_line(override, run, tmp_path):
    status, out, err = run("train", SFT, override, f"--workdir={tmp_path / 'run'}")
    assert (status, out) == (2, "")
    assert ODD_OVERRIDES[override] in err
    assert not (tmp_path / "run").exists()


def test_overrides_may_come_before_the_experiment():
    args = load("train").COMMAND.parse(["--config.steps=7", "--noconfig.data.pack", SFT])
    assert (args.experiment.config.steps, args.experiment.config.data.pack) == (7, False)


def test_the_mappings_of_the_config_are_known():
    """Those of the dataclasses, and the terms in the objective."""

    def mappings(section, prefix=""):
        for name, hint in typing.get_type_hints(section).items():
            if dataclasses.is_dataclass(hint):
                yield from mappings(hint, f"{prefix}{name}.")
            elif Mapping in {typing.get_origin(kind) or kind for kind in (hint, *typing.get_args(hint))}:
                yield f"{prefix}{name}"

    assert {*mappings(config.Config), "objective.terms"} == set(MAPPINGS)


@pytest.fixture
def data_folder(tmp_path):
    """A folder with two files of records, one that is none, and a stale copy that isn't to be seen."""
    folder = tmp_path / "data"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl", "notes.csv", ".ipynb_checkpoints/a.jsonl"):
        (folder / name).write_text('{"headline": "a", "completion": "b", "tokens": [1], "logprob": -1.0}\n')
    return folder


@pytest.mark.parametrize("name", ["score", "label", "split", "filter"])
def test_which_files_a_folder_held_is_said(name, data_folder, tmp_path, capsys):
    model = [] if name in ("split", "filter") else [f"--model={tmp_path / 'none'}"]
    parts = ["--parts=x:1", '--fields={"text": "headline"}'] if name == "split" else []
    cli.main([name, *model, f"--data={data_folder}", f"--output={tmp_path / 'out'}", *parts])
    assert f"--data: {data_folder} holds 2 .jsonl files, left out: 1 .csv\n" in capsys.readouterr().err


GOLDEN = Path(__file__).parents[1] / "golden/hf_tiny"
WRONG_KINDS = {"llama_seqcls": "a classifier of 2 classes", "bert_mlm": "an encoder, which reads in both directions"}
TEXTS = '{"text": "a b"}\n'
# Command lines that need a model that predicts the next token; MODEL, DATA and OUT stand for paths.
NEXT_TOKEN = {
    "generate": ["generate", "--model=MODEL", "--prompt=a"],
    "generate from a file": ["generate", "--model=MODEL", "--data=DATA", "--output=OUT"],
    "score": ["score", "--model=MODEL", "--data=DATA", "--output=OUT"],
    "perplexity": ["evaluate", "--model=MODEL", "--task=perplexity:DATA"],
    "choice": ["evaluate", "--model=MODEL", "--task=choice:DATA"],
    "exact_match": ["evaluate", "--model=MODEL", "--task=exact_match:DATA"],
    "lm_eval": ["evaluate", "--model=MODEL", "--lm_eval=arc_easy"],
    "label by words": ["label", "--model=MODEL", "--data=DATA", "--output=OUT", "--words=x,y"],
    "annotate": ["annotate", SFT, "--teacher=MODEL", "--output=OUT"],
}


@pytest.mark.parametrize(
    ("case", "model"),
    [pair for pair in itertools.product(NEXT_TOKEN, WRONG_KINDS) if pair != ("generate from a file", "bert_mlm")],
)  # an encoder fills in what is masked in a file
def test_models_of_another_kind_are_refused(case, model, tmp_path, capsys, monkeypatch):
    """Before their parameters are read, or anything is written."""
    monkeypatch.setattr("research.evals.lm_eval_adapter.import_lm_eval", lambda: None)
    monkeypatch.setattr("research.pretrained.load.load", lambda *args: pytest.fail("the parameters were read"))
    monkeypatch.setattr("research.devices.compilation.use_compilation_cache", lambda *args: None)
    (tmp_path / "x.jsonl").write_text(TEXTS.replace("text", "prompt") if case.startswith("generate") else TEXTS)
    paths = {"MODEL": GOLDEN / model, "DATA": tmp_path / "x.jsonl", "OUT": tmp_path / "out"}
    argv = NEXT_TOKEN[case]
    for name, path in paths.items():
        argv = [flag.replace(name, str(path)) for flag in argv]
    assert cli.main(argv) == Exit.BAD_INPUT
    err = capsys.readouterr().err
    assert f"{GOLDEN / model}: is {WRONG_KINDS[model]}, and doesn't predict the next token. Name a language" in err
    assert ("(understudy label asks it for labels)" in err) == (model == "llama_seqcls")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["llama", "bert_mlm"])
def test_what_is_no_classifier_labels_by_words_alone(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("research.devices.compilation.use_compilation_cache", lambda *args: None)
    (tmp_path / "x.jsonl").write_text(TEXTS)
    flags = [f"--model={GOLDEN / model}", f"--data={tmp_path / 'x.jsonl'}", f"--output={tmp_path / 'out'}"]
    assert cli.main(["label", *flags]) == Exit.BAD_INPUT
    kind = WRONG_KINDS.get(model, "a language model")
    assert f"{GOLDEN / model}: is {kind}, and no classifier." in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "--model=MODEL", "--prompt=a"],
        ["score", "--model=MODEL", "--data=DATA", "--output=OUT"],
        ["evaluate", "--model=MODEL", "--task=perplexity:DATA"],
        ["label", "--model=MODEL", "--data=DATA", "--output=OUT", "--words=x,y"],
        ["annotate", SFT, "--teacher=MODEL", "--output=OUT"],
    ],
    ids=lambda argv: argv[0],
)
def test_commands_keep_compiled_programs(argv, tmp_path, capsys, monkeypatch):
    """Where training keeps them, so that a second start reads them."""
    options = (
        "compilation_cache_dir",
        "persistent_cache_min_compile_time_secs",
        "persistent_cache_min_entry_size_bytes",
    )
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in options}
    (tmp_path / "x.jsonl").write_text(TEXTS)
    paths = {"MODEL": GOLDEN / "llama", "DATA": tmp_path / "x.jsonl", "OUT": tmp_path / "out"}
    for name, path in paths.items():
        argv = [flag.replace(name, str(path)) for flag in argv]
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert cli.main(argv) == Exit.BAD_INPUT  # the model has no tokenizer
        assert jax.config.jax_compilation_cache_dir == str(Path(os.environ["UNDERSTUDY_CACHE"]) / "xla")
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.2
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


GOOD_COMPLETION = {"prompt": "a", "completion": "b", "tokens": [1], "logprob": -1.0}
# Mistaken command lines -> what their error says. DATA holds a text, FOLDER is there, and so is the file FILE.
MISTAKES = {
    "split --data=DATA --output=FOLDER/s --parts=../x:1": "'../x' is no name of a file in --output",
    "split --data=DATA --output=FOLDER/s --parts=a/b:1": "'a/b' is no name of a file in --output",
    'split --data=DATA --output=FOLDER/s --parts=a:1 --fields={"txt":"a"}': "--fields: there is no field 'txt'",
    'label --model=m --words=a,b --data=DATA --output=FOLDER/o --fields={"txt":"a"}': "Did you mean 'text'?",
    "label --model=m --words=a,b --data=DATA --output=FOLDER/o --prompt=x": "--prompt = x: has no {text}",
    "filter --data=DATA --output=FOLDER": "is a folder. Name a file in it.",
    "filter --data=DATA --output=FOLDER/none/o": "there is no folder",
    "evaluate --model=m --task=perplexity:DATA --num_fewshot=3": "--num_fewshot = 3: is of --lm_eval",
    "evaluate --model=m --task=perplexity:DATA --include_path=.": "--include_path = .: is of --lm_eval",
    "evaluate --model=m --task=perplexity,limit=1,limit=2:DATA": "option 'limit' is there twice",
    "evaluate --model= --task=choice:DATA": "--model: is missing",
    "score --model=a --model=b --data=DATA --output=FOLDER/o": "--model = b: was a before, and can be one",
    "score --model=m --data=DATA --output=FOLDER/o --mesh=data=1,data=2": "data is there twice",
    "train --config=experiments/sft.py:debug --workdir=FILE": "is a file. Name a folder",
    "train --config=experiments/sft.py:debug --workdir=FILE/x": "is a file. Name a folder",
    "study --config=experiments/weak_to_strong.py:debug --workdir=FILE": "is a file. Name a folder",
    "train --config=FILE": "get_config() gives no ConfigDict",
    "train --config=": "--config: is missing",
    "plan --config=experiments/sft.py:debug --topology=cpu:0": "--topology=cpu:0: has no device",
    "plan --config=experiments/sft.py:debug --topology=0*v5e:2x2": "--topology=0*v5e:2x2: has no device",
    "plan --config=experiments/sft.py:debug --topology=cpu:1 --output=FOLDER": "is a folder. Name a file in it.",
    "plan --config=experiments/sft.py:debug --topology=cpu:1 --max_compiles=4": "--max_compiles = 4: is of --search",
    "plan --config=FILE --topology=cpu:1 --output=FILE": "get_config() gives no ConfigDict",
    "train --config=experiments/sft.py:debug --workdir=": "--workdir: is empty. Write --workdir=DIR",
    "report --workdir=": "--workdir: is empty",
    "train --config=experiments/sft.py:debug --workdir=/proc/x": "/proc can't be written to (",
    "train --config=experiments/sft.py:debug --workdir=FOLDER/LONG": "has a name of 250 bytes",
    "train --config=experiments/sft.py:debug --workdir=FOLDER/DEEP": "bytes long, and there is room for 3840",
    "train --config=experiments/sft.py:debug --workdir=FOLDER/link": "is a link that leads nowhere. Name a folder",
    "study --config=experiments/weak_to_strong.py:debug --workdir=/proc/x": "/proc can't be written to (",
    "sweep --config=experiments/sft.py:debug --workdir=/proc/x": "/proc can't be written to (",
    "generate --model=m --prompt=a --output=/proc/x": "--output = /proc/x: /proc can't be written to (",
    "generate --model=m --prompt=a --output=/dev/null --overwrite": "is no file, but a device or a pipe",
    "generate --model=m --prompt=a --output=FOLDER/LONG": "has a name of 250 bytes",
    "score --model=m --data=DATA --output=/proc/x": "/proc can't be written to (",
    "label --model=m --words=a,b --data=DATA --output=/proc/x": "/proc can't be written to (",
    "filter --data=DATA --output=/proc/x": "/proc can't be written to (",
    "export --model=m --output=/proc/x": "/proc can't be written to (",
    "evaluate --model=m --task=perplexity:DATA --output=/proc/x.json": "/proc can't be written to (",
    "split --data=DATA --output=/proc/x --parts=a:1,b": "/proc can't be written to (",
    "split --data=DATA --output=FOLDER/FILE --parts=a:1,b": "is a file. Name a folder",
    "annotate --config=experiments/sft.py:debug --teacher=m --output=/proc/x": "/proc can't be written to (",
    "plan --config=experiments/sft.py:debug --topology=cpu:1 --output=/proc/x": "/proc can't be written to (",
    "benchmark --config=experiments/sft.py:debug --output=/proc/x/y": "/proc can't be written to (",
    "benchmark --config=experiments/sft.py:debug --output=FOLDER": "is a folder. Name a file in it",
    "benchmark --config=experiments/sft.py:debug --profile=/proc/x": "/proc can't be written to (",
    "report --workdir=FOLDER --output=/proc/x": "/proc can't be written to (",
    "generate --model=m --prompt=a --output=FILE": "is there already. Give --overwrite to replace it",
    "filter --data=DATA --output=FILE": "is there already. Give --overwrite to replace it",
    "score --model=m --data=DATA --output=FILE": "is there already. Give --overwrite to replace it",
    "plan --config=experiments/sft.py:debug --topology=cpu:1 --output=FILE": "is there already. Give --overwrite",
    "generate --model=m --prompt=a --overwrite": "--overwrite: is of --output",
    "generate --model=m --prompt=a --batch_size=16": "--batch_size = 16: is of --data",
    "generate --model=m --fill=a --batch_size=16": "--batch_size = 16: is of --data",
    "generate --model=m --data=DATA --output=DATA": "is read by this command",
    "generate --model=m --data=FOLDER/./x.jsonl --output=DATA": "is read by this command",
    "generate --model=m --prompt=a --stop=": "--stop: is empty",
    "filter --data=DATA --output=DATA": "is read by this command",
    "label --model=m --words=a,b --data=DATA --output=DATA --overwrite": "is read by this command",
    "label --model=m --words=a,b --data=FOLDER/*.jsonl --output=DATA --overwrite": "is read by this command",
    "label --model=m --words=a,b --data=FOLDER --output=DATA --overwrite": "is read by this command",
    "label --model=m,./m --words=a,b --data=DATA --output=FOLDER/o": "./m is there twice",
    "score --model=m --data=DATA --output=DATA": "is read by this command",
    "split --data=DATA --output=FOLDER --parts=x:1,y": "is read by this command",
    "benchmark --config=experiments/sft.py:debug --only=": "--only: is empty",
    "benchmark --config=experiments/sft.py:debug --only=,": "names none. Give some of train",
    "benchmark --config=experiments/sft.py:debug --only=decode --objectives=sft": "is of the part train",
    "benchmark --config=experiments/sft.py:debug --only=train --decode_batch=1": "is of the part decode",
    "benchmark --config=experiments/sft.py:debug --only=data --profile=FOLDER/p": "is of the part train",
    "study --config=experiments/weak_to_strong.py:debug --jobs=2 --dry_run": "--jobs: is of a study whose",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistaken_command_lines_are_one_line(line, tmp_path, run):
    (tmp_path / "x.jsonl").write_text(TEXTS)
    (tmp_path / "file.py").write_text("def get_config():\n    return 3\n")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    paths = {"DATA": tmp_path / "x.jsonl", "FOLDER/FILE": tmp_path / "file.py", "FILE": tmp_path / "file.py"}
    paths |= {"FOLDER": tmp_path, "LONG": "x" * 250, "DEEP": "/".join(["x" * 100] * 40)}
    argv = line.split()
    for name, path in paths.items():
        argv = [word.replace(name, str(path)) for word in argv]
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert MISTAKES[line] in err
    assert {path.name for path in tmp_path.iterdir()} <= {"x.jsonl", "file.py", "link", "__pycache__"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("completion", 3),
        ("tokens", []),
        ("tokens", 3),
        ("logprob", "a"),
        ("logprob", float("nan")),
        ("messages", []),
        ("messages", "abc"),
        ("response", 4),
    ],
)
def test_completions_that_generate_would_not_write_are_named(field, value, tmp_path, run):
    lines = [GOOD_COMPLETION, {**GOOD_COMPLETION, field: value}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, _, err = run("filter", f"--data={tmp_path / 'x.jsonl'}", f"--output={tmp_path / 'o'}")
    assert (status, f"x.jsonl:2: {field} = {value!r}: isn't what" in err) == (2, True)


def test_an_output_is_never_an_input(tmp_path, run):
    results, samples = tmp_path / "x.json", tmp_path / "x.samples.jsonl"
    for path in (results, samples):
        path.write_text('[{"text": "a"}]\n')
        status, _, err = run("evaluate", "--model=m", f"--task=perplexity:{path}", f"--output={results}")
        assert (status, f"{path}: is read by this command" in err) == (2, True)
    (tmp_path / "link.jsonl").symlink_to(samples)
    status, _, err = run("filter", f"--data={samples}", f"--output={tmp_path / 'link.jsonl'}")
    assert (status, "is read by this command" in err) == (2, True)
    (tmp_path / "mine.py").write_text("from experiments.sft import *")
    experiment = f"--config={tmp_path / 'mine.py'}:debug"
    status, _, err = run("plan", experiment, "--topology=cpu:1", f"--output={tmp_path / 'mine.py'}")
    assert (status, "is read by this command" in err) == (2, True)
    assert (tmp_path / "mine.py").read_text() == "from experiments.sft import *"


def test_an_output_may_lie_in_a_models_folder_and_beside_data(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "data").mkdir()
    for name in ("run/config.json", "run/completions.jsonl", "data/a.jsonl", "data/b.jsonl.partial"):
        (tmp_path / name).write_text("{}\n")
    files.check_apart(tmp_path / "run/completions.jsonl", [tmp_path / "run"])
    files.check_apart(tmp_path / "data/b.jsonl", [tmp_path / "data"])  # begun, and not yet read
    with pytest.raises(InputError, match="is read by this command"):
        files.check_apart(tmp_path / "data/a.jsonl", [tmp_path / "data"])
    with pytest.raises(InputError, match="is read by this command"):
        files.check_apart(tmp_path / "data/b.jsonl", [tmp_path / "data/b.jsonl.partial"])
