"""The kernels of a job's compiled parts: Inductor and Triton bring them to a GPU's own code, and
nothing runs.

Invariant: each kernel is assembled by the ptxas of triton's package for the pretended GPU, as the
GPU's own process would; a kernel that no configuration of Inductor's fits ends the rehearsal.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from forescale.plan.gpu import Gpu
from forescale.rehearsal.observer import Cost, Observer
from forescale.rehearsal.waits import place, shorter


def leave_out_kernels() -> None:
    """Let torch's compiler divide its graphs into forward and backward as Inductor does, whose
    operations then run one by one, for the rest of this process; in Inductor's order, where that
    puts products beside what ranks exchange."""
    import torch._inductor.config as inductor
    from torch._dynamo.backends import debugging

    def run_one_by_one(module: fx.GraphModule, inputs: Any) -> Any:
        if inductor.reorder_for_compute_comm_overlap:
            order_exchanges(module.graph)
            module.recompile()
        return debugging.boxed_nop(module, inputs)

    debugging.get_nop_func = lambda: run_one_by_one
    wrapper: Any = torch._TorchCompileInductorWrapper
    wrapper.__call__ = lambda _, graph, inputs: debugging.aot_eager_decomp_partition(graph, inputs)


def order_exchanges(graph: fx.Graph) -> None:
    """Order the operations of a graph as Inductor's passes raise_comms and sink_waits order its
    kernels: first what a collective needs, waits last; else as they were."""
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    before = dict.fromkeys(nodes, len(nodes))  # the first collective that needs a node
    for at, node in enumerate(nodes):
        if _is_collective(node):
            todo = [node]
            while todo:
                if before.get(one := todo.pop(), -1) > at:
                    before[one] = at
                    todo += one.all_input_nodes
    raised = _ordered(nodes, lambda node, at: (before[node], at))
    last = next(node for node in reversed(graph.nodes) if node.op != "call_function")
    for node in _ordered(raised, lambda node, at: (_is_wait(node), at)):
        last.prepend(node)


def _ordered(
    nodes: Sequence[fx.Node], rank: Callable[[fx.Node, int], tuple[int, int]]
) -> list[fx.Node]:
    """Return the nodes in the order of their ranks, each after its inputs."""
    places = {node: at for at, node in enumerate(nodes)}
    missing = {node: sum(n in places for n in node.all_input_nodes) for node in nodes}
    ready = [(*rank(node, at), node) for node, at in places.items() if not missing[node]]
    heapify(ready)
    order: list[fx.Node] = []
    while ready:
        *_, node = heappop(ready)
        order.append(node)
        for user in node.users:
            if user in places:
                missing[user] -= 1
                if not missing[user]:
                    heappush(ready, (*rank(user, places[user]), user))
    return order


def _is_collective(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", "") == "_c10d_functional" and not _is_wait(node)


def _is_wait(node: fx.Node) -> bool:
    return node.target is torch.ops._c10d_functional.wait_tensor.default


class KernelError(Exception):
    """A kernel can't be assembled. place: of the kernel, or of what it computes; lead: of the
    sentence that says why."""

    def __init__(self, name: str, where: str, error: Exception):
        super().__init__(str(error))
        self.place, self.lead = where, f"the kernel {name} can't be assembled: "


class Kernels:
    """The kernels that were assembled, and how often each would run."""

    def __init__(self, gpu: Gpu, observer: Observer):
        self.gpu, self.observer = gpu, observer
        self.facts: dict[str, dict[str, Any]] = {}
        self.runs: Counter[str] = Counter()

    def use(self) -> None:
        """Let torch's compiler make kernels for the pretended GPU, for the rest of this process."""
        import torch._inductor.config as inductor
        import torch._inductor.runtime.compile_tasks as tasks
        import torch._inductor.runtime.triton_helpers as helpers
        from torch._inductor.runtime import triton_heuristics

        # Each would compute on the device, or look for one in another process.
        inductor.joint_graph_constant_folding = False
        inductor.compile_threads = 1
        inductor.fx_graph_cache = False
        inductor.shape_padding = False  # it times products on the device, or fills real matrices
        for name in ("use_static_cuda_launcher", "use_static_triton_launcher"):
            if hasattr(inductor, name):  # it keeps of a kernel what it loads alone
                setattr(inductor, name, False)
        helpers.set_driver_to_gpu = _nothing
        if hasattr(tasks, "set_driver_to_gpu"):
            tasks.set_driver_to_gpu = _nothing
        autotuner: Any = triton_heuristics.CachingAutotuner
        assemble = autotuner._precompile_worker

        def precompile(tuner: Any, warm_cache_only: bool = False, **_: Any) -> None:
            try:
                assemble(tuner)
            except Exception as e:
                raise KernelError(tuner.fn.__name__, place(), e) from e
            self._note(tuner.fn.__name__, tuner.compile_results[0].kernel)

        autotuner.precompile = precompile
        autotuner.run = lambda tuner, *args, **_: self._ran(tuner.fn.__name__, args)
        _answer_for_wrappers()

    def use_for_launches(self, assemble: bool) -> None:
        """Let kernels that a model launches itself be assembled, or else be left out."""
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction, MockTensor

        driver.set_active(_Driver(self.gpu))
        launch = JITFunction.run

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            name, code = kernel.fn.__name__, kernel.fn.__code__
            if assemble:
                types = (MockTensor(a.dtype) if isinstance(a, Tensor) else a for a in args)
                try:
                    assembled = launch(kernel, *types, grid=grid, warmup=True, **kwargs)
                except Exception as e:
                    where = f"{shorter(code.co_filename)}:{code.co_firstlineno}"
                    raise KernelError(name, where, e) from e
                self._note(name, assembled)
            self._ran(name, args)

        JITFunction.run = run

    def _note(self, name: str, kernel: Any) -> None:
        self.facts[name] = {
            "shared": int(getattr(kernel.metadata, "shared", 0) or 0),
            **_resources(kernel.asm["cubin"]),
        }

    def _ran(self, name: str, args: Any) -> None:
        if not self.observer.waits.counting:
            return
        self.runs[name] += 1
        moved = sum(t.numel() * t.element_size() for t in args if isinstance(t, Tensor))
        self.observer.spend(Cost(name, self.observer.phase, 0, moved))

    def report(self) -> dict[str, Any]:
        """Return what was seen, as plain values."""
        from torch._dynamo.utils import counters, graph_break_reasons

        breaks = {
            f"{shorter(at.filename)}:{at.lineno}": why.reason.strip().splitlines()[0][:300]
            for why in graph_break_reasons
            for at in why.user_stack[-1:]
        }
        return {
            "graphs": int(counters["stats"].get("unique_graphs", 0)),
            "breaks": [f"{at}: {why}" for at, why in breaks.items()],
            "kernels": [
                {"name": name, "runs": self.runs[name], **facts}
                for name, facts in self.facts.items()
            ],
        }


class _Driver:
    """What Triton asks of a driver while it compiles."""

    utils = None
    launcher_cls = None

    def __init__(self, gpu: Gpu):
        self.gpu = gpu

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        major, minor = self.gpu.capability
        return GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, *_: Any) -> int:
        return 0

    def set_current_device(self, *_: Any) -> None:
        pass

    def is_active(self) -> bool:
        return True

    def get_benchmarker(self) -> Any:
        """Return what times a configuration of an autotuned kernel: it is assembled, and each is as
        fast."""

        def benchmark(launch: Any, quantiles: Any = (0.5,), **_: Any) -> list[float]:
            launch()
            return [1.0] * len(quantiles)

        return benchmark

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def _nothing(*_: Any) -> None:
    pass


def _answer_for_wrappers() -> None:
    """Let the code that Inductor writes around kernels make fake tensors: it calls functions past
    the dispatcher, which alone knows them."""
    guards: Any = torch._C._dynamo.guards
    guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda"
    )
    guards._reinterpret_tensor = lambda tensor, size, stride, offset=0: torch.as_strided(
        tensor, size, stride, tensor.storage_offset() + offset
    )
    guards.copy_if_misaligned = lambda tensor: tensor


_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


def _resources(cubin: bytes) -> dict[str, int]:
    """Return the registers of a thread, and the bytes of its stack, in which spilled registers
    are."""
    spec = find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    tool = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    usage = _USAGE.search(done.stdout)
    return {"registers": int(usage[1]), "stack": int(usage[2])} if usage else {}
