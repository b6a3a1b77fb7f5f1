"""What a run says of its data at the start."""

import json

from research.run import record
from research.sources.dataset import DataSpec, load
from research.sources.tokenizers import TokenizerSpec


class Printer:
    """Keeps what a metrics.Writer would print."""

    def __init__(self):
        self.lines = []

    def print(self, line):
        self.lines.append(line)


def test_skipped_and_rendered_records_are_said(tmp_path):
    pairs = [{"prompt": f"<|user|>{i}" if i < 3 else f"p{i}", "response": "r"} for i in range(20)]
    lines = [{"version": 1}, *pairs, {"prompt": "q", "response": "r", "tools": [{"name": "f"}]}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = DataSpec(path=str(tmp_path / "x.jsonl"), seq_len=64, on_bad_record="skip")
    printer = Printer()
    record.describe_data(printer.print, load(spec, TokenizerSpec()).report)
    first, second = printer.lines[:2]
    assert first.endswith("x.jsonl: 22 records, 1 skipped: unknown format, 1 skipped: has tools")
    assert second.endswith(
        "x.jsonl: 3 of 22 records spell special tokens of this tokenizer, such as '<|user|>', and are read as plain "
        "text. Where conversations were rendered into them, give the messages instead."
    )


def test_comparisons_are_counted(tmp_path):
    pairs = [{"prompt": f"p{i}", "chosen": "c", "rejected": "c" if i < 2 else "r"} for i in range(20)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    printer = Printer()
    record.describe_data(
        printer.print, load(DataSpec(path=str(tmp_path / "x.jsonl"), seq_len=64), TokenizerSpec()).report
    )
    assert printer.lines[0].endswith("x.jsonl: 20 records, 20 comparisons, 2 with one answer twice")


def test_several_sources_are_a_table(tmp_path):
    for name, count in (("a", 40), ("b", 20)):
        lines = [{"prompt": f"{name}{i}", "response": "yes"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources = {name: {"path": str(tmp_path / f"{name}.jsonl"), "weight": w} for name, w in (("a", 0.75), ("b", 0.25))}
    spec = DataSpec("", sources=sources, seq_len=64, eval_fraction=0.1)
    report = load(spec, TokenizerSpec()).report
    head, first, second = record.source_table(report, drawn=1000)
    assert head.split() == ["source", "examples", "tokens", "learned", "of", "rows", "of", "tokens", "epochs"]
    assert first.split()[0] == "a"
    assert first.split()[4] == "75.0%"
    rows = -(-report["sources"][1]["tokens"] // 64)
    assert abs(float(second.split()[-1]) - 250 / rows) < 0.2 * 250 / rows
    assert record.source_table(report)[0].split()[-1] == "tokens"
    plain = DataSpec(sources["a"]["path"] + "," + sources["b"]["path"], seq_len=64)
    assert "of rows" not in record.source_table(load(plain, TokenizerSpec()).report)[0]
    assert record.source_table(load(DataSpec(sources["a"]["path"], seq_len=64), TokenizerSpec()).report) == []
