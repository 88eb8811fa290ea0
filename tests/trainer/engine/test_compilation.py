"""Parts compiled alone give the same gradients, block after block; a missing compiler is named; and
optimizers that import no compiler update as torch's own do."""

import ast
import json
import subprocess
import sys
from functools import partial

import pytest
import torch

from forescale.config.compose import compose
from forescale.config.schema import ConfigError
from forescale.config.train import TrainJob
from forescale.engine import compilation as module
from forescale.engine.compilation import (
    compilation,
    compile_parts,
    compiler_missing,
    fix_sizes,
    keep_to,
    probe_here,
    reuse_graphs,
)
from forescale.ground.errors import UserError
from forescale.models import ModelConfig, Transformer
from forescale.models.heads.loss import window_losses
from forescale.models.memory import activations
from tests.models.checks import kept_bytes

SIZES = dict(num_layers=3, width=32, num_heads=2, vocab_size=50, max_sequence_length=16)


def job(*words):
    return compose(TrainJob, ["train.steps=1", "schedule.warmup=0", *words])


def test_what_is_compiled_on_which_device(monkeypatch):
    monkeypatch.setattr(module, "compiler_missing", lambda: None)
    assert compilation(job(), 1, "cpu") == (True, False, None, None)
    assert compilation(job(), 2, "cpu") == compilation(job(), 1, "cuda") == (True, True, None, None)
    assert compilation(job("engine=zero3"), 2, "cpu") == (True, True, None, None)
    assert compilation(job("train.compile=off"), 2, "cpu") == (False, False, None, None)
    users_model = ("engine=zero3", "model=custom", "model._target_=a.B")
    assert not compilation(job(*users_model), 2, "cpu").enabled
    assert compilation(job(*users_model, "train.compile=on"), 2, "cpu").enabled


@pytest.mark.parametrize(
    ("on_gpu", "variable", "words"),
    [(False, "CXX", r"a C\+\+ compiler \(no-such\)"), (True, "CC", r"a C compiler \(no-such\)")],
)
def test_each_device_needs_its_own_compiler(monkeypatch, on_gpu, variable, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setenv(variable, "no-such")
    missing = compiler_missing()
    assert missing is not None
    assert compilation(job(), 1, "cpu").notice.endswith(f"this machine lacks {missing}.")
    with pytest.raises(Exception, match=f"lacks {words}"):
        compilation(job("train.compile=on"), 1, "cpu")


def arrivals(model) -> list[int]:
    """Watch a backward pass: how many parameters have a gradient when that of each block's output
    comes, from the last block to the first, and how many do at the end of the list."""
    arrived, gradients = [], []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(arrived.append)

    def watch(_, __, output):
        x = output[0] if isinstance(output, tuple) else output
        x.register_hook(lambda _: gradients.append(len(arrived)))

    for block in model.blocks:
        block.register_forward_hook(watch)
    return gradients


@pytest.mark.slow  # seconds each
@pytest.mark.parametrize(
    "change",
    [
        dict(),
        dict(mtp_layers=1, tie_embeddings=True, z_loss=1e-4),
        dict(mlp="moe", activation_checkpointing="full"),
        dict(activation_checkpointing="selective"),
        dict(mlp="moe", activation_checkpointing="selective"),
    ],
    ids=str,
)
def test_parts_give_gradients_early_and_equal_those_without(change):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SIZES, **change))
    rows = torch.randint(0, 50, (2, 17))

    def total(of):
        output = of(rows[:, :-1], rows[:, 1:])
        losses, penalty = output if isinstance(output, tuple) else (output, 0.0)
        return losses.sum() + penalty

    expected = torch.autograd.grad(total(model), list(model.parameters()))
    assert compile_parts(model, backend="aot_eager")
    order = arrivals(model)
    total(model).backward()
    behind = [len(list(block.parameters())) for block in model.blocks[::-1]]
    assert [n - order[0] for n in order] == [sum(behind[:i]) for i in range(3)]
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-5)


def test_rows_of_another_length_have_graphs_of_their_own():
    torch._dynamo.reset()
    sizes = []

    def backend(graph, inputs):
        sizes.append([tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)][-1])
        return graph

    with torch._dynamo.config.patch(automatic_dynamic_shapes=True):
        fix_sizes()
        double = torch.compile(lambda rows: rows + rows, backend=backend)
        for length in (4, 8, 16, 8):
            double(torch.ones(2, length))
    assert sizes == [(2, 4), (2, 8), (2, 16)]


@pytest.mark.slow  # seconds each
def test_compiled_blocks_keep_the_part_that_the_budget_says():
    config = ModelConfig(**SIZES | dict(width=64, num_heads=4, max_sequence_length=64))
    rows = torch.randint(0, 50, (2, 65), generator=torch.Generator().manual_seed(1))
    results = []
    for budget in (None, 0.5, 0.1):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Transformer(config)
        keep_to(budget)
        assert compile_parts(model, "aot_eager_decomp_partition")

        def loss(model=model):
            return model(rows[:, :-1], rows[:, 1:]).sum()

        bytes_kept = kept_bytes(model, loss)
        loss().backward()
        planned = activations(config, 2, 64, 4, fused_norms=False, budget=budget).saved
        results.append((bytes_kept, planned, [p.grad for p in model.parameters()]))
    keep_to(None)
    assert results[0][0] > 1.5 * results[1][0] > 3 * results[2][0]
    for bytes_kept, planned, gradients in results:
        assert bytes_kept <= planned <= 1.5 * bytes_kept
        for compiled, plain in zip(gradients, results[0][2], strict=True):
            torch.testing.assert_close(compiled, plain)


def test_a_budget_that_nothing_can_keep_to_is_refused(monkeypatch):
    words = "train.activation_memory_budget=0.5"
    monkeypatch.setattr(module, "compiler_missing", lambda: None)
    assert compilation(job(words), 1, "cpu").budget == 0.5
    with pytest.raises(UserError, match="such a class isn't compiled at stage 3"):
        compilation(job(words, "engine=zero3", "model=custom", "model._target_=a.B"), 2, "cpu")
    monkeypatch.setattr(module, "compiler_missing", lambda: "a compiler")
    with pytest.raises(UserError, match="this machine lacks a compiler"):
        compilation(job(words), 1, "cpu")
    for extra, problem in [
        ("train.compile=off", "is for blocks that are compiled"),
        ("model.activation_checkpointing=full", "full has chosen what is made again"),
    ]:
        with pytest.raises(ConfigError, match=problem):
            job(words, extra)


@pytest.mark.slow  # the compiler compiles C++
@pytest.mark.timeout(600)
def test_a_later_start_finds_the_graphs_of_the_loss_on_disk():
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 6, 8, generator=generator, requires_grad=True)
    weight = torch.randn(11, 8, generator=generator, requires_grad=True)
    targets = torch.randint(11, (2, 6), generator=generator)

    def started(softcap):
        """Gradients in a process that begins to compile, and what its cache has found."""
        torch._dynamo.reset()
        counters.clear()
        total = torch.compile(partial(window_losses, softcap=softcap))(
            hidden, weight, targets
        ).sum()
        gradients = torch.autograd.grad(total, [hidden, weight])
        return gradients, counters["aot_autograd"]["autograd_cache_hit"]

    reuse_graphs()
    with fresh_cache():
        first, hits = started(1.0)
        assert hits == 0
        again, hits = started(1.0)
        assert hits == 1
        other, hits = started(2.0)
        assert hits == 0
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])


_DIVIDED = """
import re, torch
import torch.distributed as dist
from torch._inductor.utils import run_and_get_code
from torch.testing._internal.distributed.fake_pg import FakeStore
from forescale.engine.compilation import put_products_beside_exchanges
from forescale.engine.parallel.tensor import divide
from forescale.models import ModelConfig, Transformer
from forescale.models.parallel.groups import TensorGroup
from forescale.rehearsal import kernels

dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
put_products_beside_exchanges()
group = TensorGroup(0, 2, dist.group.WORLD.group_name)
config = ModelConfig(num_layers=1, width=32, num_heads=2, vocab_size=50, max_sequence_length=16)
block = divide(Transformer(config), group).blocks[0]
x = torch.randn(2, 16, 32, requires_grad=True)
turn = torch.ones(16, 1, 8), torch.zeros(16, 1, 8)


def names(lines):
    kind = re.compile(r"[._ ](mm|all_reduce|wait_tensor)(_[0-9]+|_?[.(])")
    matches = map(kind.search, lines)
    return [match.group(1) for match in matches if match]


def run(backend):
    torch._dynamo.reset()
    torch.compile(block.forward, backend=backend)(x, turn).sum().backward()


_, codes = run_and_get_code(run, "inductor")
calls = [[x for x in code.splitlines() if "torch.ops" in x or "kernels.mm(" in x] for code in codes]
print([names(lines) for lines in calls])
graphs, order = [], kernels.order_exchanges


def noted(graph):
    order(graph)
    graphs.append(names(f" {node.name}(" for node in graph.nodes))


kernels.order_exchanges = noted
kernels.leave_out_kernels()
run("inductor")
print(graphs)
"""


@pytest.mark.slow  # the compiler compiles C++
@pytest.mark.skipif(compiler_missing() is not None, reason="the machine lacks a compiler")
def test_gradients_of_matrices_are_made_while_ranks_exchange_those_of_the_stream():
    done = subprocess.run([sys.executable, "-c", _DIVIDED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    inductor, rehearsed = map(ast.literal_eval, done.stdout.splitlines()[-2:])
    begun = [backward[backward.index("all_reduce") :] for _, backward in (inductor, rehearsed)]
    waits = 2 * ["wait_tensor"]  # torch waits twice for what is traced
    of_mlp, of_mixer = 3 * ["mm"], 4 * ["mm"]
    between = [*of_mlp, *waits, *of_mixer, "all_reduce", *of_mixer, *waits]
    assert begun == 2 * [["all_reduce", *between]]
    assert inductor[0] == rehearsed[0]


@pytest.mark.slow  # builds a library for each set of the processor's vector instructions
@pytest.mark.skipif(compiler_missing() is not None, reason="the machine lacks a compiler")
def test_the_compiler_finds_the_same_vector_instructions_in_this_process(monkeypatch, tmp_path):
    from torch._inductor import cpu_vec_isa
    from torch._inductor.cpu_vec_isa import VecISA

    probe, code = VecISA._probe_load, VecISA._avx_code
    names = cpu_vec_isa.x86_isa_checker()
    known = [isa for isa in cpu_vec_isa.supported_vec_isa_list if {*str(isa).split()} <= {*names}]
    apart = [isa.check_build(code) for isa in known]
    monkeypatch.setattr(VecISA, "_probe_load", probe)  # what it is again afterwards
    probe_here()
    monkeypatch.setattr(cpu_vec_isa.subprocess, "run", None)  # no process is started
    assert [isa.check_build(code) for isa in known] == apart
    (tmp_path / "broken.so").write_bytes(b"no library")
    assert not any(isa._probe_load(str(tmp_path / "broken.so")) for isa in known)
    lacks = "extern void no_such(); void* there = (void*)no_such;"
    assert not any(isa.check_build(f'extern "C" {{ {lacks} }}') for isa in known[:1])


_UPDATES = """
import torch
from forescale.config.sections.optimizer import AdamWConfig
from forescale.engine.optimizers import adamw, lion

results = []
for module in (adamw, lion):
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    optimizer = module.build(AdamWConfig(), [{"params": [weight], "lr": 0.25}])
    for step in range(3):
        (weight * torch.tensor([1.0, -2.0, 0.5])).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())
        results.append([weight.requires_grad, weight.grad is None, weight.tolist()])
"""
_PROCESS = f"""
import json, sys
from forescale.engine.compilation import without_compiler

without_compiler()
{_UPDATES}
print(json.dumps([results, "torch._dynamo" in sys.modules]))
"""


def test_optimizers_update_to_the_bit_as_torchs_own_and_import_no_compiler(tmp_path):
    command = [sys.executable, "-P", "-c", _PROCESS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    torchs: dict = {}
    exec(_UPDATES, torchs)
    assert json.loads(done.stdout) == [torchs["results"], False]
