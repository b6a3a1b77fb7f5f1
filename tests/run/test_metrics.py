import contextlib
import json
import math
import os
import struct
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event

from research.errors import InputError
from research.run import metrics
from research.run.checkpoint import SaveFailed
from research.run.console import describe, duration
from research.run.metrics import Writer, peak_flops, read_metrics, read_samples
from research.train import means


def open_writer(workdir, start_step=0, **kwargs):
    kwargs = {"total_steps": 100, "tensorboard": False, "run_config": {"seed": 1}} | kwargs
    return Writer(str(workdir), start_step=start_step, **kwargs)


def scalar(x):
    return jnp.asarray(x, jnp.float32)


def test_means_divides_sums_not_averages():
    parts = [{"loss": (scalar(2.0), scalar(1.0))}, {"loss": (scalar(2.0), scalar(3.0)), "once": (6, 2)}]
    assert means(parts) == {"loss": 1.0, "once": 3.0}


def test_means_without_weight_are_left_out_and_nan_is_kept():
    parts = [{"empty": (scalar(0.0), scalar(0.0)), "bad": (scalar(math.nan), scalar(1.0))}]
    found = means(parts)
    assert set(found) == {"bad"}
    assert math.isnan(found["bad"])


def test_records_come_back_with_nan_and_inf_from_valid_json(tmp_path):
    with open_writer(tmp_path / "new") as writer:
        writer.write(1, {"train/loss": scalar(0.5), "a": math.nan, "b": -math.inf})
        written = (tmp_path / "new/metrics.jsonl").read_text()  # before closing: a line is flushed at once
    json.loads(written, parse_constant=pytest.fail)
    (record,) = read_metrics(str(tmp_path / "new"))
    assert record["step"] == 1
    assert record["train/loss"] == 0.5
    assert math.isnan(record["a"])
    assert record["b"] == -math.inf
    assert record["time"] > 1.7e9


def test_restart_drops_what_will_be_done_again(tmp_path):
    with open_writer(tmp_path) as writer:
        for step in range(6):
            writer.write(step, {"train/loss": step})
            writer.text(step, "sample", f"line one\nüñ {step}")
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "ti')  # killed here
    assert [r["step"] for r in read_metrics(str(tmp_path))] == [0, 1, 2, 3, 4, 5]
    with open_writer(tmp_path, start_step=3) as writer:
        writer.write(4, {"train/loss": 40.0})
    assert [r["train/loss"] for r in read_metrics(str(tmp_path))] == [0, 1, 2, 3, 40]
    assert [s["text"] for s in read_samples(str(tmp_path))] == [f"line one\nüñ {step}" for step in range(4)]
    with open_writer(tmp_path, start_step=0) as writer:
        writer.write(0, {"eval/loss": 1.0})
    assert [r["step"] for r in read_metrics(str(tmp_path))] == [0]


def test_a_broken_line_inside_is_an_error_with_its_place(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: .*Delete"):
        read_metrics(str(tmp_path))


def test_workdir_without_metrics(tmp_path):
    with pytest.raises(InputError, match=r"no metrics\.jsonl"):
        read_metrics(str(tmp_path))
    assert read_samples(str(tmp_path)) == []


def read_events(folder):
    events = []
    for name in sorted(os.listdir(folder)):
        data = (folder / name).read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return events


def test_tensorboard_gets_values_text_and_the_purge_step(tmp_path):
    with open_writer(tmp_path, start_step=7, tensorboard=True) as writer:
        writer.write(8, {"train/loss": 0.5})
        writer.text(8, "sample", "2+2=4")
    events = read_events(tmp_path / "tensorboard")
    assert [e.step for e in events if e.HasField("session_log")] == [8]
    values = [(e.step, v) for e in events for v in e.summary.value]
    assert (8, 0.5) in [(step, v.simple_value) for step, v in values if v.tag == "train/loss"]
    assert any(b"2+2=4" in v.tensor.string_val[0] for _, v in values if v.tag.startswith("sample"))
    (given,) = (v for _, v in values if v.tag == "_hparams_/session_start_info")
    assert b"seed" in given.metadata.plugin_data.content


def test_lines_where_there_is_no_terminal(tmp_path, capsys):
    with open_writer(tmp_path) as writer:
        writer.write(0, {})  # no line
        writer.write(0, {"eval/loss": 2.0, "eval/exact_match": 0.25})
        writer.advance(5)
        writer.write(
            10,
            {
                "train/loss": 1.2341,
                "train/grad_norm": 0.52,
                "train/learning_rate": 1e-3,
                "train/other": 3,
                "train/tokens_per_second": 23_123.0,
                "train/mfu": 0.412,
            },
        )
        writer.print("a message")
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "step 0/100  eval  loss 2  exact_match 0.25"
    assert lines[1].startswith("step 10/100  loss 1.234  grad_norm 0.52  lr 1.0e-03  23.1k tok/s  MFU 41%  ETA ")
    assert lines[2:] == ["a message"]
    logged = [line[21:] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert logged == lines


def test_a_full_disk_keeps_no_line_from_the_console_and_ends_no_thread(tmp_path, capsys):
    """log.txt is written by the thread of TensorBoard's writer too, which a run would wait for in vain."""
    with open_writer(tmp_path) as writer:
        room = writer._log._file
        with open("/dev/full", "wb", buffering=0) as writer._log._file:
            writer.print("first")
            writer.print("second")
        writer._log._file = room
        writer.print("third")
    lines = capsys.readouterr().err.splitlines()
    assert [lines[0], *lines[2:]] == ["first", "second", "third"]
    assert "log.txt: can't be written (No space left on device)" in lines[1]
    logged = [line[21:] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert logged == ["first", "second", "third"]


def test_what_can_not_be_closed_is_said_and_the_run_ends_for_its_own_reason(tmp_path, monkeypatch, capsys):
    """On a full disk the last lines have no room; a told error had become a traceback of files that were closed."""
    broken = FakeWandb()
    broken.finish = lambda exit_code: broken.calls.remove(exit_code)
    monkeypatch.setitem(sys.modules, "wandb", broken)
    told, writers = SaveFailed("checkpoints/2: couldn't be saved"), []

    def run():
        with open_writer(tmp_path, tensorboard=True, wandb={}) as writer:
            writers.append(writer)
            writer.write(1, {"train/loss": 1.0})
            for file in (writer._metrics, writer._samples, writer._log):
                file._file.close()
                file._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
            writer.write(2, {"train/loss": 2.0})
            writer.text(2, "sample", "x")
            raise told

    with pytest.raises(SaveFailed) as raised:
        run()
    assert raised.value is told
    assert told.__context__ is None
    lines = [line.replace(f"{tmp_path}/", "") for line in capsys.readouterr().err.splitlines()]
    full = "can't be written (No space left on device)"
    ends = [f"metrics.jsonl: {full}; the end of it is lost", f"samples.jsonl: {full}; the end of it is lost"]
    ends += ["Weights & Biases: couldn't be closed (ValueError: list.remove(x): x not in list)"]
    assert lines[-4:] == [*ends, f"log.txt: {full}; the end of it is lost"]
    assert [r["train/loss"] for r in read_metrics(str(tmp_path))] == [1.0]
    (writer,) = writers
    assert writer._tensorboard.all_writers is None
    writer.print("after the end")
    assert capsys.readouterr().err == "after the end\n"


def test_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2, raising=False)
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((120, 24)))
    with open_writer(tmp_path, start_step=10) as writer:
        writer.advance(11)
        writer.write(50, {"train/loss": 1.5})
        writer.print("a message")
        writer.write(100, {"train/loss": 1.25, "eval/loss": 2.0})
    drawn = capsys.readouterr().err.replace("\r", "\n").split("\n")
    assert "a message" in [line.strip() for line in drawn]
    assert "step 100/100  eval  loss 2" in [line.strip() for line in drawn]
    assert any(line.startswith("step 50/100 █") and "loss 1.5" in line and "ETA" in line for line in drawn)
    assert any(line.startswith("step 100/100 █") and "loss 1.25" in line for line in drawn)


def test_only_process_0_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with open_writer(tmp_path / "new", tensorboard=True) as writer:
        writer.write(1, {"train/loss": 1.0})
        writer.text(1, "sample", "x")
        writer.advance(1)
        writer.print("x")
    assert not (tmp_path / "new").exists()
    assert capsys.readouterr().err == ""


def test_wandb_missing_names_the_extra_and_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[wandb\]'"):
        open_writer(tmp_path / "new", wandb={"project": "p"})
    assert not (tmp_path / "new").exists()


class FakeWandb:
    """Records what it is called with, as wandb.init and the run it returns."""

    Html = staticmethod(lambda text: ("html", text))

    def __init__(self):
        self.calls = []

    def init(self, project=None, mode=None, id=None, resume=None, dir=None, config=None):
        self.calls.append(("init", project, id, resume, config))
        return self

    def log(self, values, step):
        self.calls.append(("log", step, values))

    def finish(self, exit_code):
        self.calls.append(("finish", exit_code))


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(InputError, match=r"wandb\.projct.*'project'"):
        open_writer(tmp_path, wandb={"projct": "p"})
    with contextlib.suppress(KeyboardInterrupt), open_writer(tmp_path, wandb={"project": "p"}) as writer:
        writer.write(1, {"train/loss": 1.0})
        raise KeyboardInterrupt
    with open_writer(tmp_path, start_step=1, wandb={"project": "p"}) as writer:
        writer.text(2, "sample", "<b>")
    first, log, end, second, text, end2 = fake.calls
    assert first == second
    assert first[1] == "p"
    assert first[3:] == ("allow", {"seed": 1})
    assert log == ("log", 1, {"train/loss": 1.0})
    assert text == ("log", 2, {"sample": ("html", "<pre>&lt;b&gt;</pre>")})
    assert (end, end2) == (("finish", 1), ("finish", 0))


def test_describe_and_duration():
    assert describe({"eval/sort/exact_match": 0.5, "train/loss": math.nan, "x": 1}) == (
        "loss nan  eval  sort/exact_match 0.5  x 1"
    )
    rollout = {"train/rollout/agreeing": 0.375, "train/reward": 0.0625, "train/loss": -0.01, "train/reward/mine": 1.0}
    assert describe(rollout) == "loss -0.01  reward 0.0625  agreeing 38%"
    scores = {"skipped_too_long": 0.0, "accuracy": 0.0, "nll": 2.5, "loss": 2.5, "exact_match": 0.5}
    scores |= {"exact_match/copy": 1.0, "exact_match/sort": 0.0, "alone": 0.25, "alone/a": 0.25, "b/identical": 2.0}
    assert describe({f"eval/{name}": value for name, value in scores.items()}) == (
        "eval  loss 2.5  accuracy 0  exact_match 0.5 (copy 1, sort 0)  alone 0.25  b/identical 2"
    )
    startup = {"startup/trained_parameters": 98_624.0, "startup/seconds": 12_345.6, "x": math.inf}
    assert describe(startup) == "startup  trained_parameters 98,624  seconds 1.235e+04  x inf"
    assert [duration(s) for s in (0, 83, 3723, 2 * 86400 + 3723)] == ["0:00", "1:23", "1:02:03", "2d 1:02:03"]


def device(kind, platform="gpu", num_cores=1):
    return SimpleNamespace(device_kind=kind, platform=platform, num_cores=num_cores)


@pytest.mark.parametrize(
    ("found", "flops"),
    [
        (device("TPU v2", "tpu"), 23e12),  # a device is one core of two
        (device("TPU v4", "tpu", 2), 275e12),
        (device("TPU v4", "tpu", 1), 137.5e12),
        (device("TPU v5 lite", "tpu"), 197e12),
        (device("TPU v5", "tpu", 2), 459e12),
        (device("TPU7x", "tpu"), 1153.5e12),
        (device("NVIDIA A100-SXM4-80GB"), 312e12),
        (device("NVIDIA H100 80GB HBM3"), 989.5e12),
        (device("NVIDIA H100 PCIe"), 756.5e12),
        (device("NVIDIA L4"), 121e12),
        (device("NVIDIA L40S"), 362e12),
        (device("NVIDIA A10G"), 70e12),
        (device("Tesla V100-SXM2-16GB"), 125e12),
        (device("NVIDIA GeForce RTX 4090"), 165.2e12),
        # Near names of other chips, and a slice of one.
        (device("NVIDIA GeForce RTX 4090 Laptop GPU"), None),
        (device("NVIDIA GB200"), None),
        (device("NVIDIA L40"), None),
        (device("NVIDIA H100 80GB HBM3 MIG 1g.10gb"), None),
        (device("TPU v9", "tpu"), None),
    ],
)
def test_peak_flops(found, flops):
    assert peak_flops(found) == flops


def test_unknown_peak_is_in_the_log(monkeypatch):
    logged = []
    monkeypatch.setattr(metrics.logging, "warning", lambda text, *args: logged.append(text % args))
    assert peak_flops(device("Chip 3000")) is None
    assert len(logged) == 1
    assert "'Chip 3000'" in logged[0]


def test_peak_of_a_cpu_is_measured():
    assert 1e8 < peak_flops(jax.devices("cpu")[0]) < 1e14
