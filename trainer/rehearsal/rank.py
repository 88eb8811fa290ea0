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
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from forescale.ground.processes import die_with_parent
from forescale.plan.gpu import Gpu

STEPS = 2  # the first one makes moments, traces and graphs; the last is a steady one
PROGRESS = "rehearsal: "  # what a line of progress on standard error begins with


@dataclass(frozen=True)
class Request:
    """What a rank rehearses. config: the frozen RehearseJob as text; vocabulary: of the data;
    reads_data: whether its own batches are read; micro_batches: of a step, where they are not;
    library: see library.py; gpu: the fields of a Gpu; folder: for the files of its run."""

    config: str
    vocabulary: int
    rank: int
    micro_batches: int
    reads_data: bool
    library: str
    gpu: dict[str, Any]
    folder: str = ""


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
        from forescale.rehearsal.attempt import reduced
        from forescale.rehearsal.config import RehearseJob
        from forescale.rehearsal.device import pretend
        from forescale.rehearsal.kernels import Kernels
        from forescale.rehearsal.observer import Observer
        from forescale.rehearsal.waits import Waits
        from forescale.resilience.phases import PhaseTimer

        self.request = request
        self.job = reduced(thaw(RehearseJob, request.config, trust=True), request.reads_data)
        self.size = self.job.world_size
        gpu = Gpu(**request.gpu | {"capability": tuple(request.gpu["capability"])})
        self.waits = Waits()
        pretend(gpu, self.waits)
        self.observer = Observer(self.waits)
        self.observer.roofline = self._seconds
        machine, per_node = self.job.machine, self.job.per_node
        if machine.intra_node:
            self.observer.timeline.seconds_of = lambda c: c.seconds(machine, per_node)
        self.kernels = Kernels(gpu, self.observer)
        self.report: dict[str, Any] = {"rank": request.rank, "phase": "start"}
        self.phases = PhaseTimer("start")
        self.batch: Any = None  # of the newest step
        self.phases.hook = lambda: self._mark(self.phases.at)

    def run(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        from forescale.rehearsal.attempt import answer_for_others, load_weights, parts_of
        from forescale.run.start import open_sources
        from forescale.train.loop import train
        from forescale.train.resume import Position

        self._join()
        answer_for_others()
        with FakeTensorMode(allow_non_fake_inputs=True), self.observer:
            say("building the engine")
            self._build()
            if self.job.run.origin.run is not None:
                self.phases.mark("load")
                load_weights(self.engine)
            sources = open_sources(self.job.data) if self.request.reads_data else None
            folder, vocabulary = Path(self.request.folder), self.request.vocabulary
            parts = parts_of(self.job, sources, vocabulary, self.engine, self.phases, folder)
            batches = self._watched(parts.batches if sources else self._batches())
            callbacks = [parts.metrics, *parts.user_callbacks]
            rates, never = (lambda step: (1.0, 1.0)), (lambda: False)
            place = Position(), self.phases, never, parts.guard
            position, _ = train(self.engine, batches, rates, callbacks, *place)
            self._after_the_steps(parts, position)

    def _mark(self, phase: str) -> None:
        self.observer.phase = phase
        if sys.exc_info()[0] is None:  # an error leaves the phases that it came through
            self.report["phase"] = phase

    def _join(self) -> None:
        import torch.distributed as dist
        from torch.testing._internal.distributed.fake_pg import FakeStore

        self.phases.mark("join")
        dist.init_process_group(
            "fake", rank=self.request.rank, world_size=self.size, store=FakeStore()
        )

    def _build(self) -> None:
        from forescale.config.sections.objective import PreferencesConfig
        from forescale.engine import world
        from forescale.engine.build import build_engine, partition_of, stage_of
        from forescale.engine.compilation import compilation
        from forescale.engine.deepspeed_config import deepspeed_config
        from forescale.engine.determinism import use_kernels
        from forescale.rehearsal.config import has_triton
        from forescale.rehearsal.kernels import leave_out_kernels
        from forescale.train.model import adapting, build_model, freeze
        from forescale.train.preferences import Comparison

        job, size = self.job, self.size
        self.phases.mark("build")
        world.set_environment()
        use_kernels(job.train.deterministic, True)
        world.compare_nothing()
        self.world = world.join(deepspeed_config(job, size), size, 60.0, job.mesh(size))
        model = build_model(
            job,
            self.request.vocabulary,
            adapting(job, partition_of(job, self.world)),
            draws=job.run.origin.run is None,
            stage=stage_of(job, self.world),
        )
        freeze(job, model)
        self.engine = build_engine(self.world, model, job)
        self.engine.mark = self.phases.mark
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

    def _watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches of the steps; count what the last one does, and answer after it."""
        for step in range(STEPS):
            say(f"step {step + 1} of {STEPS}")
            if step == STEPS - 1:
                self.waits.counting = True
                self.observer.reset()
            batch = next(batches, None)  # the job may have one step
            self.batch = batch or replace(self.batch, step=step)
            yield self.batch
        self.waits.counting = False
        self._answer()

    def _batches(self) -> Iterator[Any]:
        """Yield batches of the shapes of the job's own."""
        yield from map(self._batch, range(STEPS))

    def _batch(self, step: int) -> Any:
        import torch

        from forescale.data.stream import Batch, MicroBatch

        job, micro = self.job, []
        shape = (job.rows_at_once, job.train.sequence_length)
        first = self.world.data.rank * self.request.micro_batches
        for i in range(self.request.micro_batches):
            tokens, targets = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
            documents = torch.zeros(shape, dtype=torch.int32) if job.data.document_mask else None
            micro.append(MicroBatch(first + i, tokens, targets, documents).pinned())
        windows, total = job.train.global_batch, len(micro) * self.world.data.size
        shares, nothing = {"data": shape[0] * shape[1] * total}, frozenset[Any]()
        samples = step * windows, (step + 1) * windows
        return Batch(step, *samples, micro, shares, 0, total, nothing, nothing)

    def _after_the_steps(self, parts: Any, position: Any) -> None:
        """Evaluate, save, load what was saved, and make a step with it, as a run does."""
        from forescale.rehearsal.attempt import overflow, resume
        from forescale.run.directory import Run

        self.observer.reset()
        parts.validation.score(replace(position, step=0))  # after the last step it takes all text
        if not self.request.reads_data:
            self.phases.mark("evaluation")
            self.engine.losses(self.batch.micro[0])
        say("a save and a load")
        with self.phases("checkpoint"):
            parts.checkpoints.save(position)
        self.phases.mark("load")
        resume(self.engine)
        self.engine.train_step(self.batch, 1.0)
        if self.job.precision.kind == "fp16":
            overflow(self.engine, self.batch, self.observer)
        peaks = self.observer.peaks | self.report["peaks"]
        (saved,) = Run(self.request.folder).read_events(kind="checkpoint_saved")
        self.report |= {"phase": "done", "peaks": peaks, "saved_bytes": saved["bytes"]}

    def _answer(self) -> None:
        observer = self.observer
        observer.timeline.end()
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
            "beside": [
                {"kind": kind, "ranks": ranks, **row}
                for (kind, ranks), row in sorted(observer.timeline.rows.items())
            ],
            "waits": [
                {"kind": kind, "place": where, "times": times}
                for (kind, where), times in self.waits.places.most_common()
            ],
            "operations": self._operations(),
            **self.kernels.report(),
        }

    def _seconds(self, flops: int, moved: int) -> float:
        """Return the seconds of an operation by the roofline of the machine."""
        machine, is_fp32 = self.job.machine, self.job.precision.kind == "fp32"
        peak = (machine.peak_fp32 if is_fp32 else machine.peak_bf16) or float("inf")
        bandwidth = machine.memory_bandwidth or float("inf")
        return max(flops / peak / machine.efficiency, moved / bandwidth)

    def _operations(self) -> list[dict[str, Any]]:
        """Return the sums of the operations of each name and phase. seconds: by the roofline of the
        machine, the longer of products and bytes."""
        totals = dict[tuple[str, str], dict[str, Any]]()
        for cost, times in self.observer.operations.items():
            seconds = self._seconds(cost.flops, cost.bytes)
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
    from forescale.rehearsal.waits import doubt, shorter

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
