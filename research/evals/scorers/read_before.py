"""Whether a model has read some records in training, as far as the workdirs of its runs say."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from research import config as config_lib
from research import files
from research.errors import InputError
from research.sources import entries, mixture, tokenizers
from research.sources.store import open_store


def check_unread(field: str, name: str, origin: entries.Origin) -> None:
    """Raises InputError, which begins with `field`, where a model has read what it is to score.

    Looked at are the run of that name, those that it began with, and the adapter that it goes on with: the files that
    their data names, and hashes of what was in it, by which a copy under another name is known. Of a model that isn't
    a run's nothing is known.

    Args:
      field: that names the model.
      name: of the model.
      origin: of the records.
    """
    scored = set(_paths(origin))
    for workdir, record in _runs(name):
        config = config_lib.parse(record["config"])
        by_run = "" if workdir == name else f", which began with {workdir},"
        for entry in _entries(config):
            shared = scored & set(_located(entry))
            if shared or _has_content(workdir, record, config, origin):
                what = sorted(shared)[0] if shared else f"what {origin.name} holds, under the name {entry}"
                raise InputError(
                    f"{field}{by_run}: has read what it is to score: {what}. Train it on other data, such as another "
                    "part of `understudy split`."
                )


def _runs(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(workdir, its config.json) of a run, of the run that it began with, and so on."""
    waiting, seen = [os.path.expanduser(name)], set()
    while waiting:
        workdir = waiting.pop(0)
        record = files.read_json(Path(workdir) / "config.json", {})
        if workdir in seen or not isinstance(record.get("config"), Mapping) or "data" not in record["config"]:
            continue
        seen.add(workdir)
        yield workdir, record
        config = record["config"]
        began = [config.get("model", {}).get("init_from"), config.get("adapter", {}).get("init_from")]
        waiting += [os.path.expanduser(each) for each in began if each]


def _entries(config: config_lib.Config) -> list[str]:
    """What the training data of a run is."""
    if config.data.sources:
        return [str(source["path"]) for source in config.data.sources.values()]
    return mixture.parse("data.path", config.data.path)[0]


def _paths(origin: entries.Origin) -> Iterator[str]:
    """The files of an entry, as its identity names them; a set saved by datasets has its parts there."""
    waiting = [origin.identity]
    while waiting:
        each = waiting.pop()
        if isinstance(each, list):
            if len(each) == 3 and isinstance(each[0], str) and all(isinstance(n, int) for n in each[1:]):
                yield each[0]
            else:
                waiting += each


def _located(entry: str) -> list[str]:
    """The files of an entry; none of what isn't there any more, or never was a file."""
    try:
        return list(_paths(entries.locate(entry, count=1, seed=0)))
    except InputError:
        return []


def _has_content(workdir: str, record: Mapping[str, Any], config: config_lib.Config, origin: entries.Origin) -> bool:
    """Whether a source of a run had as many records as are scored, and the same tokens."""
    sources = (record.get("data") or {}).get("sources", [])
    count = sum(1 for _ in origin.read()) if sources else 0
    same = [source["content"] for source in sources if source["records"] == count]
    if not same:
        return False
    store = open_store(
        origin,
        tokenizers.load_tokenizer(workdir),
        format=config.data.format,
        fields=dict(config.data.fields),
        template=config.data.template,
        on_bad_record="skip",
        cache_dir=config.data.cache_dir,
    )
    return store.content in same
