"""Stands for research.studies.report."""

from research.studies.report import main as main
