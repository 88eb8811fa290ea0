"""A trace of some steps, which shows where the time goes (open it in ui.perfetto.dev)."""

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def traced(interval: tuple[int, int] | None, folder: Path, batches: Any) -> Iterator[Any]:
    """Yield the batches; record steps [first, end) of `interval` to folder/rank-N.json."""
    if interval is None:
        yield batches
        return
    first, end = interval
    profiler: Any = None

    def record() -> Generator[Any, None, None]:
        nonlocal profiler
        for batch in batches:
            if batch.step == end and profiler is not None:
                _write(profiler, folder)
                profiler = None
            if profiler is None and first <= batch.step < end:  # an attempt may begin inside
                profiler = torch.profiler.profile()
                profiler.start()
            yield batch

    recorder = record()
    try:
        yield recorder
    finally:
        recorder.close()
        batches.close()
        if profiler is not None:
            _write(profiler, folder)


def _write(profiler: Any, folder: Path) -> None:
    profiler.stop()
    folder.mkdir(exist_ok=True)
    profiler.export_chrome_trace(str(folder / f"rank-{os.environ['RANK']}.json"))
