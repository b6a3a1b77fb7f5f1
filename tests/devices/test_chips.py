"""The table of chips."""

from types import SimpleNamespace

import pytest

from research.devices import chips
from research.run import metrics


def test_a_device_that_is_one_core_has_half_of_a_chip_of_two():
    half = chips.TPUS["v5p"].share(1)
    assert (half.flops, half.memory, half.cores) == (459e12 / 2, 95 * chips.GIB / 2, 1)
    assert chips.TPUS["v5p"].share(2) == chips.TPUS["v5p"]


@pytest.mark.parametrize(
    ("kind", "name"), [("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e")]
)
def test_plans_and_utilisation_read_the_same_figures(kind, name):
    chip = chips.planned()[name]
    device = SimpleNamespace(device_kind=kind, platform="tpu", num_cores=chip.cores)
    assert metrics.peak_flops(device) == chip.flops


def test_the_first_name_that_is_in_the_device_s_counts():
    assert chips.find("NVIDIA H100 PCIe", "gpu") is chips.GPUS["H100 PCIe"]
    assert chips.find("NVIDIA H100 80GB HBM3", "gpu") is chips.GPUS["H100"]
    assert chips.find("NVIDIA H200 NVL", "gpu") is chips.GPUS["H200 NVL"]
    assert chips.find("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "gpu") is None
    assert chips.find("NVIDIA GeForce RTX 4090 Laptop GPU", "gpu") is None


def test_a_plan_needs_every_figure():
    assert set(chips.planned()) == {"v4", "v5e", "v5p", "v6e", "A100", "H100", "H200", "B200"}
    for chip in chips.planned().values():
        assert min(chip.flops, chip.memory, chip.memory_bandwidth, chip.link_bandwidth) > 0
