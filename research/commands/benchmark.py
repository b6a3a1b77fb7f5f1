"""Stands for research.bench.benchmark."""

from research.bench.benchmark import main as main
