"""Stands for research.planning.plan."""

from research.planning.plan import main as main
