"""What accelerators can do, by their makers' data sheets: the one table for utilisation and for plans."""

import dataclasses
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """The figures of one chip.

    Attributes:
      flops: peak FLOP/s of bfloat16 matrix products with float32 sums, without sparsity. V100 and T4 have no bfloat16
        matrix unit: theirs is the float16 peak.
      memory: bytes; 0 where no plan is made for the chip, as for the two below.
      memory_bandwidth: bytes/s.
      link_bandwidth: bytes/s that it can send to other chips of its slice or machine, over all links.
      cores: its TensorCores. A JAX device is one of them or all, by the kind of TPU and its settings.
    """

    flops: float
    memory: float = 0
    memory_bandwidth: float = 0
    link_bandwidth: float = 0
    cores: int = 1

    def share(self, cores: int) -> "Chip":
        """What a device has that is `cores` of the chip's cores."""
        part = cores / self.cores
        return Chip(
            self.flops * part, self.memory * part, self.memory_bandwidth * part, self.link_bandwidth * part, cores
        )


# TPU: "Key chip specifications" in cloud.google.com/tpu/docs, pages v3 to v6e and tpu7x; a link bandwidth is the sum
# one way ("interchip interconnect BW", Gbps). v2: Jouppi et al. 2020, "A Domain-Specific Supercomputer for Training
# Deep Neural Networks". NVIDIA: the data sheet of each data-centre product, halved where it gives the peak with
# sparsity alone, NVLink one way; GeForce: the GA102 and Ada white papers, appendix A.
TPUS = {
    "v2": Chip(46e12, cores=2),
    "v3": Chip(123e12, cores=2),
    "v4": Chip(275e12, 32 * GIB, 1.2e12, 2400e9 / 8, cores=2),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 1600e9 / 8),
    "v5p": Chip(459e12, 95 * GIB, 2.765e12, 4800e9 / 8, cores=2),
    "v6e": Chip(918e12, 32 * GIB, 1.6e12, 3200e9 / 8),
    "v7x": Chip(2307e12, cores=2),
}
GPUS = {
    "B200": Chip(2250e12, 180e9, 8.0e12, 900e9),
    "H200 NVL": Chip(835.5e12),
    "H200": Chip(989.5e12, 141e9, 4.8e12, 450e9),
    "H100 NVL": Chip(835.5e12),
    "H100 PCIe": Chip(756.5e12),
    "H100": Chip(989.5e12, 80e9, 3.35e12, 450e9),
    "A100": Chip(312e12, 80e9, 2.0e12, 300e9),
    "L40S": Chip(362e12),
    "L4": Chip(121e12),
    "A10G": Chip(70e12),
    "V100-PCIE": Chip(112e12),
    "V100-SXM2": Chip(125e12),
    "T4": Chip(65e12),
    "RTX 4090": Chip(165.2e12),
    "RTX 3090": Chip(71e12),
}
# A CPU's share of a machine in a plan: an order of magnitude, not a data sheet.
CPU = Chip(1e11, 16 * GIB, 2e10, 1e10)

# What JAX calls the devices of TPUs.
_TPU_KINDS = {
    "TPU v2": "v2",
    "TPU v3": "v3",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "v7x",
}


def find(device_kind: str, platform: str) -> Chip | None:
    """The chip that a JAX device belongs to; None where the tables have none, or the device is a slice of a GPU (MIG).

    Args:
      device_kind, platform: of the jax.Device.
    """
    if device_kind in _TPU_KINDS:
        return TPUS[_TPU_KINDS[device_kind]]
    if platform != "gpu" or re.search(r"\bMIG\b", device_kind):
        return None
    # In the table's order: "H100 PCIe" stands before "H100". A laptop's RTX has other figures than its namesake.
    patterns = {name: rf"\b{name}$" if name.startswith("RTX") else rf"\b{name}\b" for name in GPUS}
    return next((GPUS[name] for name, pattern in patterns.items() if re.search(pattern, device_kind)), None)


def planned() -> dict[str, Chip]:
    """Name -> chip, of those that the tables know enough about for a plan."""
    return {name: chip for name, chip in (TPUS | GPUS).items() if chip.memory}
