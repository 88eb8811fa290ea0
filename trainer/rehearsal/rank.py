"""One rank of a job on a pretended GPU, in a process of its own: builds the job's engine, makes
steps, and answers with what was seen.

    python -m forescale.rehearsal.rank < request.json

Invariant: what runs is the job's own code, DeepSpeed and torch's compiler; replaced are the device,
all values and the other ranks. The patches end with the process.
"""

import json
import os
import re
import site
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from forescale.ground.processes import die_with_parent
from forescale.plan.gpu import Gpu

STEPS = 2  # the first one makes moments, traces and graphs; the last is a steady one
PROGRESS = "rehearsal: "  # what a line of progress on standard error begins with


@dataclass(frozen=True)
class Request:
    """What a rank rehearses. config: the frozen RehearseJob as text; vocabulary: of the data;
    reads_data: whether its own batches are read; micro_batches: of a step, where they are not;
    library: see library.py; gpu: the fields of a Gpu."""

    config: str
    vocabulary: int
    rank: int
    micro_batches: int
    reads_data: bool
    library: str
    gpu: dict[str, Any]


def set_environment(request: Request, world: int) -> None:
    """Set what torch and DeepSpeed read while they are imported."""
    each = min(request.gpu["per_node"], world)
    os.environ.update(
        RANK=str(request.rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK="0",  # of the pretended GPUs this process has one
        LOCAL_WORLD_SIZE=str(each),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",
        DS_ACCELERATOR="cuda",
    )
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        os.environ.pop(name, None)


class Rehearsal:
    """The life of one rank. report: what it answers with; its "phase" is the place reached."""

    def __init__(self, request: Request):
        from forescale.config.frozen import thaw
        from forescale.rehearsal.config import RehearseJob
        from forescale.rehearsal.device import Waits, pretend
        from forescale.rehearsal.kernels import Kernels
        from forescale.rehearsal.observer import Observer

        self.request = request
        self.job = thaw(RehearseJob, request.config, trust=True)
        self.size = self.job.world_size
        gpu = Gpu(**request.gpu | {"capability": tuple(request.gpu["capability"])})
        self.waits = Waits()
        pretend(gpu, self.waits)
        self.observer = Observer(self.waits)
        self.kernels = Kernels(gpu, self.observer)
        self.report: dict[str, Any] = {"rank": request.rank, "phase": "start"}

    def run(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self._join()
        with FakeTensorMode(allow_non_fake_inputs=True), self.observer:
            say("building the engine")
            self._build()
            batches = self._batches()
            for step in range(STEPS):
                batch = next(batches)
                self._step(step, batch)
            self.waits.counting = False
            self._answer()
            self._after_the_steps(batch.micro[0])

    def _mark(self, phase: str) -> None:
        self.observer.phase = phase
        self.report["phase"] = phase

    def _join(self) -> None:
        import torch.distributed as dist
        from torch.testing._internal.distributed.fake_pg import FakeStore

        self._mark("join")
        dist.init_process_group(
            "fake", rank=self.request.rank, world_size=self.size, store=FakeStore()
        )

    def _build(self) -> None:
        from forescale.config.sections.objective import PreferencesConfig
        from forescale.engine import world
        from forescale.engine.build import build_engine, partition_of
        from forescale.engine.compilation import compilation
        from forescale.engine.deepspeed_config import deepspeed_config
        from forescale.engine.determinism import use_kernels
        from forescale.rehearsal.config import has_triton
        from forescale.rehearsal.kernels import leave_out_kernels
        from forescale.train.model import adapting, build_model, freeze
        from forescale.train.preferences import Comparison

        job, size = self.job, self.size
        self._mark("build")
        world.set_environment()
        use_kernels(job.train.deterministic, True)
        world.compare_nothing()
        self.world = world.join(deepspeed_config(job, size), size, 60.0, job.mesh(size))
        model = build_model(
            job, self.request.vocabulary, adapting(job, partition_of(job, self.world))
        )
        freeze(job, model)
        self.engine = build_engine(self.world, model, job)
        self.engine.mark = self._mark
        if isinstance(job.objective, PreferencesConfig):
            self.engine.combine = Comparison(job.objective.beta)
        named = [*self.engine.module.named_parameters(), *self.engine.module.named_buffers()]
        self.report["on_host"] = [n for n, t in named if t.numel() and t.device.type != "cuda"]
        if has_triton():
            self.kernels.use_for_launches(job.rehearse.has_kernels)
        # A model may compile a part where the job compiles nothing.
        if job.rehearse.has_kernels:
            self.kernels.use()
        else:
            leave_out_kernels()
        chosen = compilation(job, size, "cuda")
        self.report["compiled"] = chosen.enabled
        if chosen.enabled:
            self._say_what_compiles()
            self.engine.compile(chosen.by_part, chosen.budget, "inductor")

    def _say_what_compiles(self) -> None:
        from torch._dynamo.callback import callback_handler

        parts = count(1)
        callback_handler.register_start_callback(lambda _: say(f"compiling, part {next(parts)}"))

    def _step(self, step: int, batch: Any) -> None:
        say(f"step {step + 1} of {STEPS}")
        if step == STEPS - 1:
            self.waits.counting = True
            self.observer.reset()
        self._mark("data")
        facts = self.engine.train_step(batch, 1.0)
        self._mark("summary")
        first, count = batch.micro[0].index, batch.micro_batches
        self.world.share(step, facts.losses, first, count, 0, False, False, facts.extra)
        for _ in self.world.summaries(behind=1):
            pass

    def _batches(self) -> Iterator[Any]:
        """Yield the job's own batches, or some of the same shapes."""
        if not self.request.reads_data:
            yield from (self._batch(step) for step in range(STEPS))
            return
        import numpy as np

        from forescale.config.sections.ramp import length_ramp
        from forescale.data.stream import StepShare, stream
        from forescale.run.feed import feed_of, whole_rows_of
        from forescale.run.start import open_sources

        job, fed = self.job, self.world.data
        sources, references = open_sources(job.data), None
        if job.objective.are_preferences:  # a reference would say which, with values
            bins = whole_rows_of(job, sources, "train")
            references = {n: np.zeros((int(b.counts.sum()), 2), "f4") for n, b in bins.items()}
        train = job.train
        share = StepShare(
            train.global_batch, train.micro_batch, fed.rank, fed.size, not train.invariant
        )
        yield from stream(
            feed_of(job, sources, references=references),
            share,
            range(STEPS),
            0,
            workers=0,
            pin=True,
            length=length_ramp(job).length,
            windows=job.batch_ramp.windows,
        )

    def _batch(self, step: int) -> Any:
        import torch

        from forescale.data.stream import MicroBatch

        job, micro = self.job, []
        shape = (job.rows_at_once, job.train.sequence_length)
        first = self.world.data.rank * self.request.micro_batches
        for i in range(self.request.micro_batches):
            tokens, targets = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
            documents = torch.zeros(shape, dtype=torch.int32) if job.data.document_mask else None
            micro.append(MicroBatch(first + i, tokens, targets, documents).pinned())
        targets_of_step = shape[0] * shape[1] * len(micro) * self.world.data.size
        total = len(micro) * self.world.data.size
        return SimpleNamespace(step=step, targets=targets_of_step, micro=micro, micro_batches=total)

    def _after_the_steps(self, micro: Any) -> None:
        """Score a micro-batch, and copy this rank's part of a checkpoint, as a run does."""
        from forescale.engine.portable.fragments import HostCopy
        from forescale.engine.state import owned_fragments, scalars

        self.observer.reset()
        self._mark("evaluation")
        self.engine.losses(micro)
        self._mark("checkpoint")
        copies = HostCopy().take(owned_fragments(self.engine))
        scalars(self.engine)
        peaks = self.report["peaks"] | self.observer.peaks
        saved = sum(copy.data.nbytes for copy in copies)
        self.report |= {"phase": "done", "peaks": peaks, "saved_bytes": saved}

    def _answer(self) -> None:
        observer = self.observer
        living = observer.at_peak()
        by_phase: dict[str, int] = {}
        for each in living:
            by_phase[each.phase] = by_phase.get(each.phase, 0) + each.size
        self.report |= {
            "between_bytes": observer.live,
            "peak_bytes": observer.peak,
            "peak_phase": observer.peak_phase,
            "peaks": dict(observer.peaks),
            "at_peak": by_phase,
            "largest": [
                asdict(each) | {"dtype": str(each.dtype).removeprefix("torch.")}
                for each in sorted(living, key=lambda each: -each.size)[:12]
            ],
            "collectives": [
                {"kind": kind, "ranks": ranks, "bytes": payload, "calls": calls}
                for (kind, ranks), (payload, calls) in sorted(observer.collectives.items())
            ],
            "waits": [
                {"kind": kind, "place": where, "times": times}
                for (kind, where), times in self.waits.places.most_common()
            ],
            "operations": self._operations(),
            **self.kernels.report(),
        }

    def _operations(self) -> list[dict[str, Any]]:
        """Return the sums of the operations of each name and phase. seconds: by the roofline of the
        machine, the longer of products and bytes."""
        machine, totals = self.job.machine, dict[tuple[str, str], dict[str, Any]]()
        is_fp32 = self.job.precision.kind == "fp32"
        peak = (machine.peak_fp32 if is_fp32 else machine.peak_bf16) or float("inf")
        bandwidth = machine.memory_bandwidth or float("inf")
        for cost, times in self.observer.operations.items():
            seconds = max(cost.flops / peak / machine.efficiency, cost.bytes / bandwidth)
            names = {"name": cost.name, "phase": cost.phase}
            total = totals.setdefault((cost.name, cost.phase), names)
            values = {"times": 1, "flops": cost.flops, "bytes": cost.bytes, "seconds": seconds}
            for key, value in values.items():
                total[key] = total.get(key, 0) + times * value
        return [*totals.values()]


def say(text: str) -> None:
    """Write a line of progress for the process that reads this one."""
    print(f"{PROGRESS}{text}", file=sys.stderr, flush=True)


_USER_CODE = re.compile(r'File "([^"]+)", line (\d+)')
# Of a message of torch's compiler, of ptxas, or any: the sentence that says what is wrong.
_SENTENCES = (
    re.compile(r"with fake tensors: .*got \w+\(['\"](.*?)['\"]\)", re.DOTALL),
    re.compile(r"Explanation: +(.*?)\n *(?:Hint:|Developer debug|\n|$)", re.DOTALL),
    re.compile(r"stderr:.*?(?:error|fatal) *: *(.*?)\n", re.DOTALL),
    re.compile(r"\s*(\S.*?)(?:\n|$)"),
)
_CODE = (*site.getsitepackages(), sysconfig.get_path("stdlib"), str(Path(__file__).parents[1]))
_NOT_NAMED = ("/torch/", "/triton/", str(Path(__file__).parent), "/runpy.py")


def _failure(error: Exception, waits: Any) -> dict[str, str]:
    """Return what an error says, and the line that it comes from: the innermost one of the user's
    code, where it has part in it, else of the job's. waits: of device.py."""
    from forescale.rehearsal.device import doubt, shorter

    message, _, inside = str(error).partition("\n\nfrom user code:")
    first = getattr(error, "inner_exception", error)  # of what a compiler's backend raises
    message = message if first is error else str(first)
    frames = [(f.filename, str(f.lineno)) for f in traceback.extract_tb(error.__traceback__)]
    frames += _USER_CODE.findall(inside)
    known = [f for f in frames if not any(part in f[0] for part in _NOT_NAMED)]
    users = [f for f in known if not f[0].startswith(("<", *_CODE))]
    file, line = (users or known or frames)[-1]
    matches = (sentence.search(message) for sentence in _SENTENCES)
    text = getattr(first, "lead", "") + next((match[1] for match in matches if match), "")
    return {
        "kind": type(first).__name__.removeprefix("Torch"),
        "text": " ".join(text.split()).rstrip("!.")[:600],
        "doubt": doubt(first, waits),
        "place": getattr(first, "place", f"{shorter(file)}:{line}"),
        "traceback": "".join(traceback.format_exception(error, limit=-25)),
    }


def main() -> None:
    """Answer the request on standard input with a report, as JSON on standard output."""
    answer = os.dup(1)
    os.dup2(2, 1)  # DeepSpeed prints
    request = Request(**json.load(sys.stdin))
    die_with_parent()
    from forescale.config.frozen import thaw
    from forescale.rehearsal.config import RehearseJob
    from forescale.rehearsal.library import load

    world = thaw(RehearseJob, request.config, trust=True).world_size
    set_environment(request, world)
    load(Path(request.library))
    rehearsal = Rehearsal(request)
    try:
        rehearsal.run()
    except Exception as e:
        rehearsal.report["error"] = _failure(e, rehearsal.waits)
    text = json.dumps(rehearsal.report)
    with open(answer, "w") as f:
        f.write(text)
        f.flush()
    os._exit(0)  # what DeepSpeed does at exit needs the other ranks


if __name__ == "__main__":
    main()
