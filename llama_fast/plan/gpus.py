"""What data sheets say of GPUs: memory, rates and links. Nothing here is measured."""

from __future__ import annotations

from dataclasses import dataclass

NODE = 8  # GPUs that a fast link joins: an HGX or OAM board
# Between nodes: one 400 Gb/s adapter for each GPU, as in NVIDIA's DGX H100, H200 and B200.
NETWORK = 50.0  # GB/s in each direction
# Assumed, since no data sheet has it: a step of a collective, with its launch and its barrier.
NVLINK_LATENCY, PCIE_LATENCY, NETWORK_LATENCY = 3e-6, 10e-6, 10e-6  # seconds


@dataclass(frozen=True)
class Gpu:
    """Dense rates, by the manufacturer's data sheet. fp8: 0 where matrix units do not take it."""

    name: str
    memory: float  # GiB that PyTorch can allocate
    bandwidth: float  # TB/s
    bf16: float  # TFLOP/s
    fp8: float = 0.0
    link: float = 32.0  # GB/s in each direction; PCIe 4.0 x16 has 32
    latency: float = PCIE_LATENCY  # seconds

    def all_reduce(self, size: float, gpus: int) -> float:
        """Return the least seconds of an all-reduce of so many bytes. In one step each GPU reads
        the whole buffer of all others. In two, each sums an nth and then reads the others' sums:
        the traffic of a ring, which takes 2 (n - 1) steps. Between nodes, GPUs of the same place
        exchange their sums in a further step."""
        near, nodes = min(gpus, NODE), -(-gpus // NODE)
        one = size * (near - 1) / self.link / 1e9 + self.latency
        two = 2 * (size * (near - 1) / near / self.link / 1e9 + self.latency)
        if nodes > 1:
            return two + size / near * (nodes - 1) / NETWORK / 1e9 + NETWORK_LATENCY
        return min(one, two) if gpus > 1 else 0.0

    def send(self, size: float, gpus: int) -> float:
        """Return the least seconds of sending so many bytes to another GPU of so many."""
        far = gpus > NODE
        latency = NETWORK_LATENCY if far else self.latency
        return size / (NETWORK if far else self.link) / 1e9 + latency


def _nvlink(
    name: str, memory: float, bandwidth: float, bf16: float, fp8: float, link: float
) -> Gpu:
    return Gpu(name, memory, bandwidth, bf16, fp8, link, NVLINK_LATENCY)


# Memory: the smallest "total capacity" in published out-of-memory messages of PyTorch, which is
# what the driver leaves of the data sheet's memory (in the comments). Links: the data sheet's
# figure for both directions, halved.
GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        # NVIDIA A100 data sheet: 40 GB PCIe and SXM, 80 GB SXM; NVLink 600 GB/s. No FP8.
        _nvlink("A100-40", 39.38, 1.555, 312, 0, 300),
        _nvlink("A100-80", 79.15, 2.039, 312, 0, 300),
        # NVIDIA H100 data sheet: SXM, 80 GB; NVLink 900 GB/s. It lists rates with sparsity: twice.
        _nvlink("H100", 79.11, 3.35, 989, 1979, 450),
        # NVIDIA H200 data sheet: SXM, 141 GB, which nvidia-smi shows as 143,771 MiB.
        _nvlink("H200", 139.72, 4.8, 989, 1979, 450),
        # NVIDIA DGX B200 data sheet, divided by 8: 180 GB, NVLink 1,800 GB/s. Its memory clock and
        # width, as the driver gives them, make 7.67 TB/s (github.com/pytorch/ao/pull/4002).
        _nvlink("B200", 178.35, 8.0, 2250, 4500, 900),
        # NVIDIA L40S data sheet: 48 GB GDDR6 with ECC, PCIe 4.0.
        Gpu("L40S", 44.39, 0.864, 362, 733),
        # NVIDIA Ada GPU architecture, appendix A: sums in fp32; 24 GB GDDR6X, PCIe 4.0.
        Gpu("RTX-4090", 23.52, 1.008, 165.2, 330.3),
        # AMD Instinct MI300X data sheet: 192 GB; 7 links of 128 GB/s to the other GPUs.
        _nvlink("MI300X", 191.69, 5.3, 1307, 2615, 448),
    )
}


def named(text: str) -> Gpu:
    """Return a GPU by its name, or one given by numbers: "memory=96,bandwidth=2,bf16=500", in the
    units of Gpu's fields. Raises ValueError that lists the known ones."""
    key = text.lower()
    if key in GPUS:
        return GPUS[key]
    fields = {"memory", "bandwidth", "bf16", "fp8", "link"}
    if "=" not in key:
        raise ValueError(
            f"gpu: got {text!r}, want one of {', '.join(GPUS)}, or numbers, as "
            "memory=96,bandwidth=2,bf16=500,fp8=1000,link=300"
        )
    given = {}
    for part in key.split(","):
        name, _, number = part.partition("=")
        try:
            given[name] = float(number)
        except ValueError:
            given[name] = -1.0
        lowest = 0.0 if name == "fp8" else 1e-6
        if name not in fields or not lowest <= given[name] < float("inf"):
            raise ValueError(
                f"gpu: got {part!r}, want NAME=NUMBER with NAME one of {', '.join(sorted(fields))}"
            )
    missing = {"memory", "bandwidth", "bf16"} - set(given)
    if missing:
        raise ValueError(f"gpu: got {text!r}, want also {', '.join(sorted(missing))}")
    return Gpu("custom", **given)
