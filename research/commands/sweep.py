"""Stands for research.studies.sweep."""

from research.studies.sweep import main as main
