"""What a GPU can do at most, and how long a piece of work takes it at least.

A kernel's time is its launch and the longest of what its multiprocessors do side by side: move
bytes, read shared memory, multiply matrices, take exponentials and do fp32 arithmetic. Matrices and
arithmetic overlap only in part. Rates are ceilings measured on the GPU. Two losses come from how
many programs a multiprocessor holds: too few bytes in flight to hide the latency of memory, and a
last round of programs that leaves multiprocessors idle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Gpu:
    """Ceilings. Bytes and flops a second; measured unless said."""

    name: str
    bandwidth: float  # of a large copy
    bf16: float  # of a large matrix product
    clock: float  # assumed under load; NVIDIA states 1.98e9 as the highest
    sms: int = 132

    @property
    def fp8(self) -> float:
        """Assumed: twice bf16's, as the data sheet has it."""
        return 2 * self.bf16

    @property
    def exponentials(self) -> float:
        """16 a clock and SM. Source: CUDA C++ Programming Guide, "Arithmetic Instructions"."""
        return 16 * self.clock * self.sms

    @property
    def fp32(self) -> float:
        """Instructions, 128 a clock and SM; same source."""
        return 128 * self.clock * self.sms

    @property
    def shared(self) -> float:
        """Bytes a second out of shared memory, 128 a clock and SM; same guide, "Shared Memory"."""
        return 128 * self.clock * self.sms


H200 = Gpu("H200", 4.3e12, 790e12, 1.7e9)
H100 = Gpu("H100", 3.0e12, 798e12, 1.7e9)
GPUS = {gpu.name: gpu for gpu in (H200, H100)}

LAUNCH = 2.5e-6  # assumed: from one kernel's last program to the next one's full speed, in a graph
LATENCY = 0.8e-6  # assumed: of memory under load


@dataclass(frozen=True)
class Work:
    """What one op asks of the chip. executed: matrix flops, with the padding of tiles. workspace:
    bytes beside the op's own; shared: bytes that matrix instructions read there."""

    bytes: float
    flops: float = 0.0
    executed: float = 0.0
    exponentials: float = 0.0
    fp32: float = 0.0
    fp8: bool = False
    overlap: float = 0.0  # of arithmetic behind matrix products
    launches: int = 1
    programs: int = 0  # 0: persistent, or too many to matter
    per_sm: int = 1  # programs resident at once
    in_flight: float = math.inf  # bytes under way per program
    workspace: float = 0.0
    shared: float = 0.0
    matrix_share: float = 1.0  # of the matrix rate, what these instructions can reach


@dataclass(frozen=True)
class Prediction:
    """seconds, and what bounds them; share: of the time that the limit alone would take."""

    op: str
    seconds: float
    limit: str
    bytes: float
    flops: float
    share: float
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """flops a second where matrices bound, bytes a second elsewhere."""
        return (self.flops if self.limit == "matrix" else self.bytes) / self.seconds

    def after(self, other: Prediction) -> Prediction:
        """Both, one after the other; what bounds this one bounds the pair."""
        seconds = self.seconds + other.seconds
        return Prediction(
            self.op,
            seconds,
            self.limit,
            self.bytes + other.bytes,
            self.flops,
            self.share * self.seconds / seconds,
            {"before": other.seconds, **self.parts},
        )


def time(op: str, work: Work, gpu: Gpu = H200) -> Prediction:
    """The formula of the docstring."""
    enough = gpu.bandwidth * LATENCY / gpu.sms  # bytes that an SM must have under way
    flying = min(1.0, work.per_sm * work.in_flight / enough)
    matrix = gpu.fp8 if work.fp8 else gpu.bf16
    parts = {
        "memory": (work.bytes + work.workspace) / (gpu.bandwidth * flying),
        "shared memory": work.shared / gpu.shared,
        "matrix": work.executed / (matrix * work.matrix_share),
        "arithmetic": work.exponentials / gpu.exponentials + work.fp32 / gpu.fp32,
    }
    computing = sorted((parts["matrix"], parts["arithmetic"]))
    computed = computing[1] + (1 - work.overlap) * computing[0]
    busy = max(parts["memory"], parts["shared memory"], computed)
    slots = gpu.sms * work.per_sm
    rounds = work.programs / slots
    idle = math.ceil(rounds) / rounds if work.programs > 0 else 1.0
    parts["last round"] = busy * (idle - 1)
    parts["launch"] = LAUNCH * work.launches
    seconds = busy + parts["last round"] + parts["launch"]
    limits = ("memory", "matrix", "arithmetic", "launch", "shared memory")
    bound = max(limits, key=lambda name: parts[name])
    products = bound in ("matrix", "shared memory")
    ideal = work.flops / matrix if products else work.bytes / gpu.bandwidth
    return Prediction(op, seconds, bound, work.bytes, work.flops, ideal / seconds, parts)
