"""Tables as text, for a terminal."""

from collections.abc import Sequence

from research.errors import printable


def text_table(lines: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Returns lines of cells with their columns below each other, two spaces apart.

    Args:
      lines: each with as many cells as the first.
      width: columns beyond so many characters are left out, from the right, but for the first two.
    """
    lines = [[printable(cell) for cell in line] for line in lines]
    columns = [[cell.ljust(max(map(len, column))) for cell in column] for column in zip(*lines, strict=True)]
    while width is not None and len(columns) > 2 and sum(len(column[0]) + 2 for column in columns) > width + 2:
        columns.pop()
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
