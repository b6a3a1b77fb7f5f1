"""How commands read their flags and how they end."""

from research.cli.command import *  # noqa: F403
