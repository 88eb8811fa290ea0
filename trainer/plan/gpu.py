"""The kinds of GPU that can be pretended. Invariant: imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU. memory: bytes; capability: of CUDA, such as (9, 0); processors: streaming
    multiprocessors; shared: bytes of shared memory that a block of threads can have; per_node: GPUs
    of a node."""

    name: str
    memory: int
    capability: tuple[int, int]
    processors: int
    shared: int
    per_node: int


# Capability, multiprocessors, shared memory of a block: NVIDIA's CUDA C++ Programming Guide (table
# of compute capabilities) and data sheets.
KINDS = {
    "A100": ((8, 0), 108, 166_912),
    "H100": ((9, 0), 132, 232_448),
    "H200": ((9, 0), 132, 232_448),
    "B200": ((10, 0), 148, 232_448),
}


def gpu_of(name: str, memory: float, per_node: int) -> Gpu | None:
    """Return the GPU of a machine, by the machine's name; None if it isn't known."""
    for kind, facts in KINDS.items():
        if kind in name:
            return Gpu(f"NVIDIA {name}", int(memory), *facts, per_node)
    return None
