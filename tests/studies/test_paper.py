"""Tables for a paper."""

import json

from research.studies import pages, paper
from research.studies.paper import Table


def test_latex_escapes_texts_and_shrinks_intervals():
    assert paper.latex_text(r"a_b & 5% of $x {y} \z ~ ^ # <c> d -> e") == (
        r"a\_b \& 5\% of \$x \{y\} \textbackslash{}z \textasciitilde{} \textasciicircum{} \# "
        r"\textless{}c\textgreater{} d $\rightarrow$ e"
    )


def test_a_study_has_its_settings_in_its_tables(tmp_path):
    config = {"steps": 7, "batch_size": 32, "study": {"seeds": 3, "ways": ["a_b"]}}
    record = {"command": "python -m research study --config=x.py", "config": config, "versions": {"jax": "1.2"}}
    (tmp_path / "study.json").write_text(json.dumps(record))
    tables = [Table("Means", ["way", "loss"], [["a|b", "-0.5 [-1, 0.2]"]], "A note."), Table("None", ["x"], [])]
    paper.write(tmp_path, "Study", tables, "How.")
    text = (tmp_path / "table.md").read_text()
    assert "| a\\|b | -0.5 [-1, 0.2] |\n\nA note." in text
    assert '| study.ways | ["a_b"] |\n| steps | 7 |\n| versions | jax 1.2 |' in text
    assert "None" not in text
    latex = (tmp_path / "table.tex").read_text()
    assert "% Made by: python -m research study --config=x.py" in latex
    assert r"\caption{Means. A note. How.}" in latex
    assert r"a\textbar{}b & $-$0.5 {\scriptsize [$-$1, 0.2]} \\" in latex
    assert latex.count(r"\begin{table}") == latex.count(r"\end{table}") == 2
    assert "steps</td><td>7" in paper.section(paper.settings(tmp_path))


def test_without_a_record_there_are_no_settings(tmp_path):
    paper.write(tmp_path, "Study", [Table("Means", ["way"], [["a"]])], "How.")
    assert paper.settings(tmp_path) is None
    assert "Settings" not in (tmp_path / "table.md").read_text()


def test_an_interval_stands_below_its_value():
    cell = pages.table(["x"], [["0.5 [0.4, 0.6]", "a [1] b"]], "numbers")
    assert '<td>0.5 <span class="interval">[0.4, 0.6]</span></td><td>a [1] b</td>' in cell
