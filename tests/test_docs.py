"""What the docs name exists: fields, links, files, commands and options. docs/configs.md is what its script writes."""

import dataclasses
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

from research import cli, config, objectives
from research.objectives import classify, distill, match, reward, weak_to_strong

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "launch/README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [*sorted((ROOT / "research").rglob("*.py")), *sorted((ROOT / "experiments").glob("*.py"))]
TEXTS = [
    path
    for folder in ("research", "experiments", "launch", "docs", "tests", ".ci")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".md", ".sh", ".yaml", ".sbatch", ".env", ".ipynb") or path.name in ("Dockerfile", "run")
]
TEXTS = [path for path in (*TEXTS, ROOT / "README.md", ROOT / "pyproject.toml") if path.is_file()]
# Names that stand for any file: experiments/x.py.
ANY = ("x", "NAME")
HOSTS = {"arxiv.org", "colab.research.google.com", "docs.vllm.ai", "github.com", "huggingface.co", "jobset.sigs.k8s.io"}
HOSTS |= {"127.0.0.1"}


def relative(path):
    return str(path.relative_to(ROOT))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make_configs():
    return load(ROOT / "docs/make_configs.py")


def test_the_page_of_fields_is_up_to_date(make_configs):
    assert make_configs.PAGE.read_text() == make_configs.page(), "run: python docs/make_configs.py"


def test_every_field_is_on_its_page_and_has_a_sentence(make_configs):
    fields = [field for section in make_configs.sections() for field in section.fields]
    assert [field.name for field in fields if not field.sentence] == [], "write it in the docstring's Attributes"
    names = {field.name for field in fields}
    assert len(names) == len(fields)
    assert leaves(config.defaults()) - {"objective.terms.next_token"} - names <= {
        f"plan.prices.{chip}" for chip in PRICES
    }


PRICES = config.defaults()["plan"]["prices"]


def leaves(values, prefix=""):
    """The dotted names of all fields."""
    out = set()
    for name, value in values.items():
        out |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name}
    return out


def anchors(path):
    """What GitHub calls the headings of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=relative)
def test_files_that_are_named_exist(path):
    text = path.read_text()
    saved = re.findall(r"[Ss]ave\s(?:this|it)\sas\s`([\w/.]+)`", text)
    for name in re.findall(
        r"(?<![\w/.-])((?:research|experiments|tests|docs|launch)/[\w/.-]+\.(?:py|md|sh|yaml|ipynb))", text
    ):
        assert (ROOT / name).exists() or name in saved or Path(name).stem in ANY, name


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=relative)
def test_commands_that_are_named_exist(path):
    text = path.read_text()
    assert set(re.findall(r"\bunderstudy ([a-z_]+)", text)) <= set(cli.names())
    for module in re.findall(r"python -m (research[\w.]*)", text):
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=relative)
def test_fields_that_command_lines_set_exist(path, make_configs):
    names = {field.name for section in make_configs.sections() for field in section.fields}
    free = ("adapter.", "objective.", "roles.", "study.", "data.sources.", "optimizer.groups.", "plan.prices.")
    for name in re.findall(r"--config\.([a-z][\w.]*\w)=", path.read_text()):
        assert name in names or name.startswith(free), f"--config.{name}"


@pytest.mark.parametrize(
    "pattern",
    [
        r"\bissues?\b",
        r"\b(this|last|earlier|later|next|previous) session\b|\bsessions\b",
        r"\.\./shared",
        r"(?<![\w.~}-])/(work|root)\b",
        r"index.url",
    ],
)
def test_nothing_of_this_machine_or_its_tools_is_named(pattern):
    lines = [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in TEXTS
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line, re.I)
    ]
    assert lines == []


def test_addresses_are_public():
    hosts = {host for path in TEXTS for host in re.findall(r"https?://([\w.-]+)", path.read_text())}
    assert {host for host in hosts if "." in host} <= HOSTS  # a name without a dot is of nobody's machine


# The options of objectives.


def options(function):
    return {name: p.default for name, p in inspect.signature(function).parameters.items() if name != "tokenizer"}


def table(page, heading):
    """The first two columns of the tables under a heading: name -> default."""
    (section,) = re.findall(rf"^##+ {heading}\n(.*?)(?=^##+ |\Z)", (ROOT / "docs" / page).read_text(), re.M | re.S)
    return dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", section, re.M))


@pytest.mark.parametrize(
    ("page", "heading", "make"),
    [
        ("distillation.md", "Options of distill", distill.make),
        ("distillation.md", "Options of match", match.make),
        ("weak_to_strong.md", "Options of classify", classify.make),
        ("preferences.md", "Options of reward", reward.make),
    ],
)
def test_options_are_described_with_their_defaults(page, heading, make):
    assert table(page, heading) == {name: shown(default) for name, default in options(make).items()}


def test_losses_are_described_with_their_options():
    (section,) = re.findall(r"^## Losses\n(.*?)^## ", (ROOT / "docs/weak_to_strong.md").read_text(), re.M | re.S)
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.M))
    assert rows == {
        name: ", ".join(f"`{field.name} = {shown(field.default)}`" for field in dataclasses.fields(kind))
        for name, kind in weak_to_strong.LOSSES.items()
    }


def shown(default):
    return repr(round(default, 2) if isinstance(default, float) else default).replace("'", '"')


# The experiments that the pages show.


@pytest.mark.parametrize("page", ["experiments.md", "distillation.md", "weak_to_strong.md", "self_supervision.md"])
def test_experiments_as_shown_are_valid(page):
    blocks = re.findall(r'^```python\n(""".*?)^```', (ROOT / "docs" / page).read_text(), re.M | re.S)
    assert blocks
    for block in blocks:
        names = {}
        exec(block, names)
        for variant in ("", "debug"):
            values = config.parse(names["get_config"](variant).to_dict())
            config.check(values, num_devices=1)
            terms = objectives.load(values.objective)
            assert {role for term in terms.values() for role in term.objective.frozen} <= set(values.roles)
