"""Shows what lies in the cache: tokens, trained tokenizers and compiled programs; or removes what is no longer used.

Nothing in it is needed: what is gone is made anew by the next run that wants it. Each entry is named by all that
decides it, so that data or code that changed leave their old entries behind, until --prune removes them. Runs check
what they read of it against its digests, block by block; --verify reads all of it, and removes what is damaged.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

from research import cli, files
from research.cli import Flag
from research.errors import did_you_mean, printable

_KINDS = ("tokens", "tokenizers", "xla")


def _kinds(text: str) -> tuple[str, ...]:
    for kind in (kinds := cli.words(text)):
        if kind not in _KINDS:
            raise ValueError(f"{kind}: no such kind.{did_you_mean(kind, _KINDS)}")
    return kinds


def _days(least: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if (days := cli.number(text)) < least:
            raise ValueError(f"must be at least {least:g}.")
        return days

    return parse


COMMAND = cli.Command(
    "cache",
    __doc__,
    flags=(
        Flag(
            "cache_dir",
            "the cache, as config.data.cache_dir",
            "",
            "$UNDERSTUDY_CACHE, else ~/.cache/understudy",
            "DIR",
            cli.path,
        ),
        Flag("kind", "only these: tokens, tokenizers, xla (compiled programs)", _KINDS, "all", "KIND,...", _kinds),
        Flag("verify", "read all tokens and tokenizers, and remove what is damaged", False),
        Flag("prune", "remove what nobody used for --days", False),
        Flag(
            "days",
            "of --prune: for how many days it wasn't used; 0 removes all",
            30,
            metavar="N",
            parse=_days(0),
            of=("prune",),
        ),
    ),
    examples=("understudy cache --kind=tokens", "understudy cache --prune --days=7", "understudy cache --verify"),
)


def main(argv: Sequence[str]) -> int:
    return COMMAND.run(argv, _cache)


def _cache(args: SimpleNamespace) -> None:
    from research.sources import cache_entries  # late: the other modules of sources take 0.2 s

    root = files.cache_root(args.cache_dir)
    entries = cache_entries.read_entries(root, args.kind)
    faults = {entry.paths: entry.fault for entry in entries} if args.verify else {}
    removed = cache_entries.unused(entries, args.days) if args.prune else []
    removed += [entry for entry in entries if faults.get(entry.paths) and entry not in removed]
    for entry in removed:
        entry.remove()
    changing = args.prune or args.verify
    for entry in removed if changing else entries:
        first, fault = entry.paths[0].relative_to(root), faults.get(entry.paths)
        about = f"damaged: {fault}" if fault else entry.about
        print(f"{_megabytes(entry.size)}  {entry.days:6.1f} days  {first}  {printable(about)}".rstrip())
    for kind in args.kind:
        sizes = [entry.size for entry in entries if entry.kind == kind]
        gone = [entry.size for entry in removed if entry.kind == kind]
        line = f"{_megabytes(sum(sizes))}  {kind}: {len(sizes):,} entries"
        print(f"{line}, {len(gone):,} removed ({sum(gone) / 1e6:,.1f} MB)" if changing else line)
    print(f"{_megabytes(sum(entry.size for entry in entries))}  {root}")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:10,.1f} MB"
