import contextlib
import dataclasses
import json
import math
import subprocess
import sys
import types

import jax.numpy as jnp
import pytest
import table_models

from research import files
from research.commands import generate
from research.evals import completions
from research.evals import prompts as prompts_lib
from research.loading import LoadedModel
from research.models.generation import Completion
from research.sources import infilling
from research.sources.formats import render_prompt
from research.sources.tokenizers import TokenizerSpec, make_tokenizer

TOKENIZER = make_tokenizer(TokenizerSpec("byte"), lambda: iter(()))
V = TOKENIZER.size
ANSWER = "é☕!"  # its bytes all differ


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the command on a model that answers everything with ANSWER; returns (status, stdout, stderr)."""
    model, table = table_models.make(V, scale=9), table_models.answering(TOKENIZER, ANSWER)
    loaded = types.SimpleNamespace(model=model, params=table, tokenizer=TOKENIZER, template="chat")

    def load_model(workdir, *, step, ema, adapter, check):
        check(model.config, workdir)
        return LoadedModel(**vars(loaded), mesh=None)

    monkeypatch.setattr("research.loading.load_model", load_model)

    def command(*flags):
        status = generate.main(["--model=x", *flags])
        return status, *capsys.readouterr()

    command.loaded = loaded
    return command


def streamed(chunks, stops):
    """The pieces in which the text of tokens comes."""
    text, pieces = completions.TextStream(TOKENIZER.decode, stops), []
    for chunk in chunks:
        pieces.append(text.add(chunk))
        if text.stopped:
            break
    return [piece for piece in [*pieces, text.end()] if piece]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize("stops", [(), ("ends",), ("en", "s h"), ("☕!",), ("nowhere", "e\n")])
@pytest.mark.parametrize("text", ["It ends 日本 here ☕!\n", "e\u0301 ✓\n\n", "", "🎉🏽"])
def test_streamed_text_is_the_whole_text(text, stops, size):
    tokens = [*TOKENIZER.encode(text), 0xE2, 0x98]  # the end of the last character doesn't come
    chunks = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    pieces = streamed(chunks, stops)
    whole, completion = completions.cut(Completion(tokens, [-1.0] * len(tokens)), TOKENIZER.decode, stops)
    assert "".join(pieces) == whole
    assert all("\ufffd" not in piece for piece in pieces[:-1])
    assert len(stops) != 1 or whole == (text + "\ufffd").partition(stops[0])[0]
    assert TOKENIZER.decode(completion.tokens).startswith(whole)
    assert len(completion.tokens) == len(completion.logprobs)


def test_text_is_not_held_back_without_need():
    chunks = [TOKENIZER.encode(c) for c in ("ab", "c#", "d#", "##", "e")]
    assert streamed(chunks, ["##end"]) == ["ab", "c", "#d", "#", "##e"]


def test_cut_keeps_the_tokens_up_to_the_stop():
    completion = Completion(TOKENIZER.encode("one. two. three"), [float(-i) for i in range(15)])
    text, kept = completions.cut(completion, TOKENIZER.decode, ["three", " two"])
    assert text == "one."
    assert TOKENIZER.decode(kept.tokens) == "one. two"
    assert kept.logprobs == [float(-i) for i in range(8)]


def test_one_prompt_streams_to_stdout(run):
    assert run("--prompt=hello") == (0, ANSWER + "\n", "")
    assert run("--prompt=hello", "--stop=☕", "--stop=x") == (0, "é\n", "")


def test_a_file_of_prompts_goes_to_stdout_or_to_json_lines(run, tmp_path):
    prompts, output = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    messages = [{"role": "user", "content": "and\u2028you?"}]
    prompts.write_text('{"prompt": "a longer one", "id": 7}\n' + json.dumps({"messages": messages}) + "\n")
    status, stdout, stderr = run(f"--data={prompts}")
    assert (status, stdout) == (0, f"{ANSWER}\n{ANSWER}\n")
    assert "2 of 2 prompts" in stderr
    status, stdout, _ = run(f"--data={prompts}", f"--output={output}", "--stop=!")
    assert (status, stdout) == (0, "")
    first, second = map(json.loads, output.read_text().rstrip("\n").split("\n"))
    assert first.pop("logprob") == pytest.approx(-6 * math.log(1 + (V - 1) * math.exp(-9)), rel=1e-4)
    assert first == {"prompt": "a longer one", "id": 7, "completion": "é☕", "tokens": TOKENIZER.encode(ANSWER)}
    assert second["messages"] == messages
    text = tmp_path / "a.txt"
    text.write_text("one\ntwo\u2028still two\nthree")
    assert run(f"--data={text}", "--batch_size=2")[:2] == (0, f"{ANSWER}\n" * 3)


def test_several_answers_to_each_prompt(run, tmp_path, monkeypatch):
    run.loaded.model = table_models.make(V, scale=0)  # any token is as likely as the next
    prompts, output = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{c}", "response": "{c}"}}\n' for c in "abc"))
    flags = (f"--data={prompts}", "--temperature=1", "--max_new_tokens=4", "--batch_size=2")

    def records(*more):
        status, stdout, _ = run(*flags, f"--output={output}", "--overwrite", *more)
        assert (status, stdout) == (0, "")
        return [json.loads(line) for line in output.read_text().splitlines()]

    got = records("--n=3")
    monkeypatch.setattr("research.evals.completions.BATCHES_AT_ONCE", 1)  # several calls, and one sum
    count = sum(len(tokens) for record in got for tokens in record["tokens"])
    said = run(*flags, f"--output={output}", "--overwrite", "--n=3")[2]
    assert (said.count(" tokens in "), f"\n{count} tokens in " in said) == (1, True)
    assert [record["prompt"] for record in got] == ["a", "b", "c"]
    for record in got:
        assert list(record) == ["prompt", "response", "completions", "tokens", "logprob"]
        assert len({tuple(tokens) for tokens in record["tokens"]}) == len(record["completions"]) == 3
        assert record["logprob"] == pytest.approx([-len(tokens) * math.log(V) for tokens in record["tokens"]], rel=1e-4)
        assert record["completions"] == [TOKENIZER.decode(tokens) for tokens in record["tokens"]]
    # A run that was killed after two prompts is gone on with.
    whole = output.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(files.ResumableLines, "finish", lambda self: 1 / 0)
        with contextlib.suppress(ZeroDivisionError):
            run(*flags, f"--output={output}", "--overwrite", "--n=3")
    partial = tmp_path / "out.jsonl.partial"
    partial.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    records("--n=3")
    assert output.read_bytes() == whole
    assert len(run(*flags, "--n=3")[1].splitlines()) >= 9
    assert records("--n=1")[0].keys() == {"prompt", "response", "completion", "tokens", "logprob"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "error: no prompt given: use one of --prompt=TEXT"),
        (["--prompt="], "error: --prompt: is empty"),
        (["--prompt=a", "--interactive"], "error: --prompt and --interactive given"),
        (["--prompt=a", "--temprature=1"], "error: --temprature: no such flag. Did you mean '--temperature'?"),
        (["--prompt=a", "--temperature=1", "--top_p=2"], "error: sampling.top_p = 2.0: must be in (0, 1]"),
        (["--prompt=a", "--max_new_tokens=0"], "error: sampling.max_new_tokens = 0"),
        (["--prompt=a", "--max_new_tokens=64"], "error: sampling.max_new_tokens = 64: leaves no room"),
        (["--prompt=" + "a" * 40], "error: --prompt: is 43 tokens long, and there is room for 32"),
        (["--prompt=a", "--stop="], "error: --stop: is empty"),
        (
            ["--prompt=a", "--output=no/such/folder/x.jsonl"],
            "error: --output = no/such/folder/x.jsonl: there is no folder 'no/such/folder'",
        ),
        (["--interactive", "--output=x.jsonl"], "error: --output = x.jsonl: a conversation"),
        (["--prompt=a", "--n=0"], "error: --n = 0: must be a whole number, at least 1"),
        (["--prompt=a", "--n=2"], "error: --n = 2: all answers to a prompt are the same without a temperature"),
        (["--interactive", "--n=2", "--temperature=1"], "error: --n = 2: a conversation goes on with one answer"),
        (["--data=missing.txt"], "error: --data = missing.txt: can't be read"),
        (["--data=x.csv"], "error: --data = x.csv: ends in neither"),
    ],
)
def test_bad_flags(run, flags, message):
    status, stdout, stderr = run(*flags)
    assert (status, stdout) == (2, "")
    assert message in stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty. Write one prompt a line"),
        ('{"prompt": "a"}\n\n', ":2: is an empty line"),
        ('{"prompt": "a"}\n{"prompt"\n', ":2: is no JSON"),
        ('{"texts": "a"}\n', ':1: is no object with "prompt", "messages" or "text", or "prefix" and "suffix"'),
        ('{"text": 3}\n', ':1: "text" is no text'),
        ("[]\n", ":1: is no object"),
        ('{"messages": "a"}\n', ':1: "messages" is no list'),
        ('{"messages": [{"role": "robot", "content": "a"}]}\n', ":1: message 1 has role 'robot'"),
        ('{"prompt": 5}\n', ":1: field 'prompt' must be text"),
        ('{"prompt": "a"}\n{"prompt": "' + "b" * 40 + '"}\n', ":2: is 43 tokens long"),
    ],
)
def test_a_faulty_line_is_named(run, tmp_path, content, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    status, stdout, stderr = run(f"--data={file}")
    assert (status, stdout) == (2, "")
    assert message in stderr


@pytest.fixture
def filled(run, monkeypatch):
    """The command, on a model that fills in ANSWER; and the prompts that it was given."""
    tokenizer = TOKENIZER.with_tokens(
        ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|mask:0|>", "<|mask:1|>"]
    )
    ids, V = TOKENIZER.encode(ANSWER), tokenizer.size
    table = jnp.full(V, tokenizer.eos, jnp.int32)
    for first in ("<|fim_middle|>", "<|mask:0|>"):
        table = table.at[tokenizer.special(first)].set(ids[0])
    table = table.at[tokenizer.special("<|mask:1|>")].set(tokenizer.special("<|mask:0|>")).at[ord("p")].set(ids[0])
    table = table.at[jnp.array(ids)].set(jnp.array([*ids[1:], tokenizer.eos]))
    run.loaded.model = table_models.make(V, scale=9)
    run.loaded.params, run.loaded.tokenizer = table, tokenizer
    run.prompts = []
    real = infilling.Infilling.prompt
    spy = lambda self, *texts: run.prompts.append(real(self, *texts)) or run.prompts[-1]  # noqa: E731
    monkeypatch.setattr(infilling.Infilling, "prompt", spy)
    return run


def test_a_middle_is_filled_in(filled):
    """It ends with the end of the text, a sentinel, or another part; each form shows the parts in its order."""
    prefix, suffix, middle = (TOKENIZER.size + i for i in range(3))
    hole, end = (TOKENIZER.size + i for i in (3, 4))
    asked = {
        (): [prefix, *b"p", suffix, *b"s", middle],
        ("--form=psm",): [prefix, *b"p", suffix, *b"s", middle],
        ("--form=spm",): [prefix, suffix, *b"s", middle, *b"p"],
        ("--form=sentinel",): [*b"p", hole, *b"s", end],
    }
    for flags, ids in asked.items():
        last = end if "--form=sentinel" in flags else TOKENIZER.eos
        filled.loaded.params = filled.loaded.params.at[ANSWER.encode()[-1]].set(last)
        # Without room for more than the answer, and the sentinel that it begins with.
        said = "" if flags else "form psm, the first that the tokenizer has the tokens of; how the model was trained "
        said += "" if flags else "isn't noted\n"
        assert filled("--prefix=p", "--suffix=s", "--max_new_tokens=6", *flags) == (0, ANSWER + "\n", said)
        assert filled.prompts[-1] == [TOKENIZER.bos, *ids]
    filled.loaded.params = filled.loaded.params.at[ANSWER.encode()[-1]].set(TOKENIZER.eos)
    note = infilling.make_note({"psm": 0.2, "spm": 0.3})
    filled.loaded.tokenizer, plain = filled.loaded.tokenizer.with_infilling(note), filled.loaded.tokenizer
    said = "form spm, as in training (of the texts spm 30%, psm 20%)\n"
    assert filled("--prefix=p", "--suffix=s", "--max_new_tokens=6") == (0, ANSWER + "\n", said)
    assert filled.prompts[-1] == [TOKENIZER.bos, *asked["--form=spm",]]
    filled.loaded.tokenizer = plain
    assert filled("--suffix=s", "--stop=☕")[:2] == (0, "é\n")
    assert filled.prompts[-1] == [TOKENIZER.bos, prefix, suffix, *b"s", middle]


def test_middles_of_a_file(filled, tmp_path):
    gaps, output = tmp_path / "gaps.jsonl", tmp_path / "out.jsonl"
    records = [{"prefix": "p", "suffix": "s", "id": 3}, {"prefix": "", "suffix": ""}]
    gaps.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert filled(f"--data={gaps}")[:2] == (0, f"{ANSWER}\n{ANSWER}\n")
    assert filled(f"--data={gaps}", f"--output={output}")[0] == 0
    first = json.loads(output.read_text().splitlines()[0])
    assert first.pop("logprob") < 0
    assert first == {**records[0], "completion": ANSWER, "tokens": [*TOKENIZER.encode(ANSWER), TOKENIZER.eos]}
    gaps.write_text(json.dumps(records[0]) + '\n{"prompt": "a"}\n')
    assert "has records with a prefix and a suffix, and others" in filled(f"--data={gaps}")[2]
    gaps.write_text('{"prefix": "a"}\n')
    assert 'gaps.jsonl:1: "suffix" must be text' in filled(f"--data={gaps}")[2]
    gaps.write_text(json.dumps({"prefix": "a" * 60, "suffix": ""}))
    assert "gaps.jsonl:1: is 64 tokens long, and there is room for 32" in filled(f"--data={gaps}")[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prefix=a", "--prompt=b"], "error: --prompt and --prefix given: use one of"),
        (["--prefix=a", "--suffix=b", "--template=plain"], "error: --template: is of prompts"),
        (["--suffix=b", "--system=x"], "error: --system: is of prompts"),
        (["--prompt=a", "--form=psm"], "error: --form = psm: is of a prefix and a suffix, and there are none"),
        (["--prefix=a", "--form=psn"], "error: --form = psn: no such choice. Did you mean 'psm'?"),
        (["--prefix=a"], "error: form = auto: the tokenizer has neither tokens around a prefix"),
        (["--prefix=a", "--form=spm"], "error: form = spm: the tokenizer has no <|fim_prefix|>"),
    ],
)
def test_what_cannot_be_filled_in_is_refused(run, flags, message):
    status, stdout, stderr = run(*flags)
    assert (status, stdout) == (2, "")
    assert message in stderr


def test_interactive_from_the_command_line(run, monkeypatch):
    lines = iter(["hi", "/quit"])
    monkeypatch.setattr("builtins.input", lambda: next(lines))
    status, stdout, _ = run("--interactive")
    assert (status, stdout) == (0, ANSWER + "\n")


@pytest.fixture
def asked(monkeypatch):
    """What is rendered, and under which template."""
    seen = []

    def render(record, tokenizer, template):
        seen.append((record, template))
        return render_prompt(record, tokenizer, template)

    monkeypatch.setattr("research.evals.prompts.render_prompt", render)
    return seen


def test_a_system_message_comes_first_where_there_is_none(run, asked, monkeypatch, tmp_path):
    system, user = {"role": "system", "content": "S"}, {"role": "user", "content": "U"}
    own = {"role": "system", "content": "own"}
    assert run("--prompt=U", "--system=S")[:2] == (0, ANSWER + "\n")
    prompts = tmp_path / "x.jsonl"
    prompts.write_text("\n".join(json.dumps(r) for r in ({"prompt": "U"}, {"messages": [own, user]})))
    assert run(f"--data={prompts}", "--system=S")[0] == 0
    lines = iter(["U", "/quit"])
    monkeypatch.setattr("builtins.input", lambda: next(lines))
    assert run("--interactive", "--system=S")[0] == 0
    messages = {"messages": [system, user]}
    assert [record for record, _ in asked] == [messages, messages, {"messages": [own, user]}, messages]
    assert run("--prompt=U", "--system=")[2] == ("error: --system: is empty. Write --system=TEXT, or leave it out.\n")


def test_filters_of_draws_without_a_temperature_are_refused(run, asked):
    flags = ["--top_k=5", "--top_p=0.9", "--min_p=0.1"]
    for flag in flags:
        assert f"{flag.replace('=', ' = ')}: nothing is drawn without a temperature" in run("--prompt=U", flag)[2]
    assert run("--prompt=U", "--temperature=0.5", *flags)[0] == 0
    assert run("--prompt=U", "--top_k=0", "--top_p=1", "--min_p=0")[0] == 0


def test_the_models_template_and_its_stop_tokens(run, asked):
    template = "{{ bos_token }}{{ messages[-1].content }}<|eos|>{% if add_generation_prompt %}<|assistant|>{% endif %}"
    own = dataclasses.replace(TOKENIZER, chat_template=template, stop=(TOKENIZER.eos, ord("!")))
    run.loaded.tokenizer, run.loaded.template = own, "auto"
    assert run("--prompt=<|eos|>")[:2] == (0, ANSWER[:-1] + "\n")
    assert run("--prompt=a", "--template=model")[:2] == (0, ANSWER[:-1] + "\n")
    assert [used for _, used in asked] == ["auto", "model"]
    specials = [own.bos, own.eos, own.special("<|assistant|>")]
    assert render_prompt("<|eos|>", own, "auto") == [specials[0], *b"<|eos|>", *specials[1:]]
    run.loaded.tokenizer = TOKENIZER
    assert run("--prompt=a", "--template=model")[2].startswith("error: --prompt: template: 'model', but the tokenizer")


def test_a_killed_run_goes_on(run, tmp_path, monkeypatch):
    prompts, output = tmp_path / "x.txt", tmp_path / "out.jsonl"
    prompts.write_text("".join(f"{i} {'x' * (i % 7)}\n" for i in range(80)))
    flags = [f"--data={prompts}", "--batch_size=2", "--temperature=1"]
    assert run(*flags, f"--output={tmp_path / 'whole.jsonl'}")[0] == 0
    real, calls = prompts_lib.Prompt.line, []

    def dies(prompt, **answer):
        calls.append(answer)
        if len(calls) == 70:
            raise KeyboardInterrupt
        return real(prompt, **answer)

    monkeypatch.setattr(prompts_lib.Prompt, "line", dies)
    status, _, stderr = run(*flags, f"--output={output}")
    assert (status, "the same command goes on" in stderr, output.exists()) == (130, True, False)
    done = len((tmp_path / "out.jsonl.partial").read_text().splitlines())
    assert 0 < done < 70
    status, _, stderr = run(*flags, f"--output={output}", "--seed=1")
    assert (status, "out.jsonl.partial: was begun by another command: --seed was 0." in stderr) == (2, True)
    calls.clear()
    assert run(*flags, f"--output={output}")[0] == 0
    group = completions.together(batch_size=2, n=1)  # the last one is torn, and made anew
    assert len(calls) == 80 - done // group * group
    assert output.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "whole.jsonl", "x.txt"]


def test_no_checkpoint_ends_with_one_line_and_status_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "research", "generate", f"--model={tmp_path / 'none'}", "--prompt=a"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path / 'none'}")
    assert "Traceback" not in done.stderr
