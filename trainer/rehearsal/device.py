"""A GPU that isn't there: what `torch.cuda` says of it in this process, its streams and its events.

Invariant: what the job's own code and DeepSpeed ask of a device, they ask of this one; each time
the host would wait for it, `Waits` receives the place.
"""

import contextlib
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from forescale.plan.gpu import Gpu
from forescale.rehearsal.operations import answer_for_operations
from forescale.rehearsal.waits import Waits


class _Event:
    """An event that is over as soon as it is recorded."""

    waits: Waits

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_event, self.stream = 0, Stream.main

    def record(self, stream: Any = None) -> None:
        self.stream = stream or Stream.current

    def wait(self, stream: Any = None) -> None:
        Stream.joined(stream or Stream.current, self.stream)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.waits.add("event")

    def elapsed_time(self, _: Any) -> float:
        return 1.0


class Stream(_Event):
    """A stream on which everything is done at once. main: that of the computation; current: where
    launches go; joined: called where one stream waits for another, with both."""

    device = torch.device("cuda", 0)
    device_index, device_type, stream_id, cuda_stream = 0, 1, 0, 0
    main: "Stream"
    current: "Stream"
    joined: Callable[["Stream", "Stream"], None] = staticmethod(lambda *_: None)

    def __init__(self, *_: Any, **__: Any) -> None:
        self._before: list[Stream] = []

    def wait_stream(self, other: "Stream") -> None:
        Stream.joined(self, other)

    def wait_event(self, event: _Event) -> None:
        Stream.joined(self, event.stream)

    def record_event(self, event: Any = None) -> Any:
        event = event or _Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.waits.add("stream")
        Stream.joined(Stream.main, self)

    def __enter__(self) -> "Stream":
        self._before.append(Stream.current)
        Stream.current = self
        return self

    def __exit__(self, *_: Any) -> None:
        Stream.current = self._before.pop()


Stream.main = Stream.current = Stream()


def pretend(gpu: Gpu, waits: Waits) -> None:
    """Let this process believe that it has `gpu.per_node` such GPUs, for the rest of its life."""
    _Event.waits = waits
    _answer_for_cuda(gpu, waits)
    answer_for_operations(waits)


def _answer_for_cuda(gpu: Gpu, waits: Waits) -> None:
    cuda: Any = torch.cuda
    properties = SimpleNamespace(
        name=gpu.name,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        total_memory=gpu.memory,
        multi_processor_count=gpu.processors,
        shared_memory_per_block=49_152,
        shared_memory_per_block_optin=gpu.shared,
        shared_memory_per_multiprocessor=gpu.shared + 1024,
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=2_048,
        max_threads_per_block=1_024,
        warp_size=32,
        L2_cache_size=50 << 20,
        gcnArchName="",
        uuid="pretended",
    )
    torch.version.cuda = torch.version.cuda or "13.0"
    cuda.default_generators = (torch.default_generator,)
    answers: dict[str, Callable[..., Any]] = {
        **_answering(True, "is_available", "is_initialized", "is_bf16_supported"),
        **_answering(0, "current_device", "_exchange_device", "_maybe_exchange_device"),
        **_answering(0, "memory_allocated", "max_memory_allocated"),
        **_answering(0, "memory_reserved", "max_memory_reserved", "initial_seed"),
        **_answering(None, "_lazy_init", "init", "set_device", "manual_seed", "manual_seed_all"),
        **_answering(None, "set_stream", "empty_cache", "reset_peak_memory_stats"),
        **_answering(None, "set_rng_state", "ipc_collect", "set_per_process_memory_fraction"),
        **_answering("", "memory_summary"),
        "device_count": lambda: gpu.per_node,
        "get_device_properties": lambda *_, **__: properties,
        "_get_device_properties": lambda *_: properties,  # what an earlier import of it calls
        "get_device_name": lambda *_, **__: gpu.name,
        "get_device_capability": lambda *_, **__: gpu.capability,
        "mem_get_info": lambda *_: (gpu.memory, gpu.memory),
        "memory_stats": lambda *_, **__: Counter(),
        "synchronize": lambda *_, **__: waits.add("device"),
        "current_stream": lambda *_, **__: Stream.current,
        "default_stream": lambda *_, **__: Stream.main,
        "stream": lambda stream: stream or contextlib.nullcontext(),
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "Stream": Stream,
        "Event": _Event,
    }
    of_c = ("_cuda_exchangeDevice", "_cuda_maybeExchangeDevice", "_cuda_getCurrentRawStream")
    for owner, some in (
        (cuda, answers),
        (cuda.nvtx, _answering(0, "range_push", "range_pop", "mark")),
        (torch._C, _answering(0, *of_c)),
        (torch.accelerator, _answering(True, "is_available")),
        (torch.accelerator, _answering(0, "current_device_index")),
        (torch.accelerator, {"synchronize": lambda *_: waits.add("device")}),
    ):
        for name, answer in some.items():
            setattr(owner, name, answer)


def _answering(value: Any, *names: str) -> dict[str, Callable[..., Any]]:
    """Return a function of its own for each name: torch's compiler keeps rules by function."""
    return {name: _constant(value) for name in names}


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value
