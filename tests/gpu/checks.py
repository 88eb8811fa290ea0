"""What must hold on a GPU. Each check is a part of the kit (kit.py), a function of a Place, which
returns None, or why this GPU can't be checked.

CHECKS names all, with their arguments. LEFT_OUT says which of them another place than a GPU can't
run, and why: these are the lines that nothing has run where there is no GPU.
"""

import os
from threading import Event
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.gpu.kit import Part, Place

VOCABULARY = 128
SMALL = ("model.width=64", "model.num_layers=2", "model.num_heads=4", "model.mlp_width=96",
         "train.sequence_length=64", "train.micro_batch=2", "train.steps=9", "schedule.warmup=0",
         "schedule.decay=1", "train.compile=off", "optimizer=adamw")  # fmt: skip
# fmt: off
# So that stage 3 divides small parameters too, and buckets fill more than once.
PARTS = ("engine.bucket_bytes=65536",
         "engine.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 50}}")
# fmt: on
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "ACCELERATE_", "DS_")
_ALL = 8  # ranks of a check of groups, where there are so many GPUs

CHECKS = {
    "mixers-fp32": Part("gpu.checks:mixers", {"precision": "fp32"}),
    "mixers-bf16": Part("gpu.checks:mixers", {"precision": "bf16"}),
    "documents-fp32": Part("gpu.checks:documents", {"precision": "fp32"}),
    "documents-bf16": Part("gpu.checks:documents", {"precision": "bf16"}),
    "fp8": Part("gpu.checks:fp8"),
    "stages-fp32": Part("gpu.checks:stages", {"precision": "fp32"}),
    "stages-bf16": Part("gpu.checks:stages", {"precision": "bf16"}),
    "stages-muon": Part("gpu.checks:stages", {"precision": "fp32", "optimizer": "muon"}),
    "compiled": Part("gpu.checks:compiled"),
    "fp16": Part("gpu.checks:fp16"),
    "streams": Part("gpu.checks:streams"),
    "copies": Part("gpu.checks:copies"),
    "saves": Part("gpu.checks:saves"),
    "resume": Part("gpu.checks:resume"),
    "groups": Part("gpu.checks:groups", ranks=_ALL),
    "stages-of-ranks": Part("gpu.checks:stages", {"precision": "fp32"}, ranks=_ALL),
}

LEFT_OUT = {
    ("pretended", "saves"): "files hold values, and pretended tensors have none",
    ("pretended", "resume"): "its processes save and load values, and pretended tensors have none",
}


def machine(at: Place) -> int:
    """Return the number of GPUs that torch can use. Raises what torch says if there is none."""
    torch.cuda.init()
    return torch.cuda.device_count()


def mixers(at: Place, precision: str) -> None:
    """Logits and gradients of each mixer, and of experts, are those of the CPU, up to rounding; and
    a second time the same to the bit, with the kernels of train.deterministic."""
    from tests.models.mixers.test_every_mixer import PATTERNS, RESIDUAL, small

    _use_kernels(at)
    configs = {"-".join(pattern): small(pattern) for pattern in PATTERNS + RESIDUAL}
    configs["experts"] = small(["attention"], mlp="moe")
    tokens = _tokens((2, 40), 37)
    problems = []
    for name, config in configs.items():
        try:
            _like_the_cpu(at, config, precision, tokens)
        except Exception as e:  # of one; the others are tested too
            problems.append(f"{name}: {type(e).__name__}: {e}")
    assert not problems, "\n".join(problems)


def documents(at: Place, precision: str) -> None:
    """Rows of several documents: flex_attention and its BlockMask, compiled, give the logits and
    gradients of a dense mask on the CPU. 300 tokens are three blocks, the last one cut."""
    from forescale.models.mixers import attention_module
    from tests.models.mixers.test_every_mixer import small

    _use_kernels(at)
    columns = torch.arange(300).repeat(2, 1)
    numbers = sum(((columns >= begin).int() for begin in (20, 150)), (columns >= 151).int())
    calls, plain = [], attention_module.flex
    attention_module.flex = lambda *args: calls.append(1) or plain(*args)
    alibi, relative = ({"position": name} for name in ("alibi", "relative"))
    cases = [(["attention"], sizes) for sizes in ({}, alibi, relative)]
    for pattern, sizes in (*cases, (["window"], {"mixer__window": 70})):
        config = small(pattern, num_heads=2, num_kv_heads=1, max_sequence_length=300, **sizes)
        _like_the_cpu(at, config, precision, _tokens((2, 300), 37), numbers)
    assert bool(calls) == at.on_gpu, "a GPU takes flex_attention, a CPU a dense mask"


def _like_the_cpu(
    at: Place, config: Any, precision: str, tokens: Tensor, numbers: Tensor | None = None
) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    results = [_passes(config, dtype, at.device, tokens, numbers)]
    assert all(t.device.type == at.device.type for t in results[0])
    if not at.has_values:
        return
    results.append(_passes(config, dtype, at.device, tokens, numbers))
    exact = _passes(config, torch.float32, torch.device("cpu"), tokens, numbers)
    # The weights are large (init_std of `small`), and so are differences.
    errors = [1e-4, 1e-3]
    if precision == "bf16":  # twice what the CPU's own rounding is
        rounded = _passes(config, dtype, torch.device("cpu"), tokens, numbers)
        # A token that rounding sends to another expert has another output.
        least = 0.3 if config.mlp.kind == "moe" else 0.02
        errors = [least + 2 * at.error(a, b) for a, b in zip(rounded, exact, strict=True)]
    for label, first, second, expected, error in zip(
        ("logits", "gradients"), *results, exact, errors, strict=True
    ):
        at.close(first, expected, error, label)
        at.equal(first, second, f"{label}, a second time")


def _passes(
    config: Any, dtype: torch.dtype, device: torch.device, tokens: Tensor, numbers: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the logits of a model, and the gradients of all its parameters as one row."""
    from forescale.models import Transformer

    torch.manual_seed(0)
    model = Transformer(config).to(device, dtype)
    masks = {} if numbers is None else {"documents_BL": numbers.to(device)}
    logits = model(tokens.to(device), **masks)
    grads = torch.autograd.grad(logits.float().square().mean(), list(model.parameters()),
                                allow_unused=True)  # fmt: skip
    return logits, torch.cat([g.flatten() for g in grads if g is not None])


def fp8(at: Place) -> str | None:
    """Products in fp8, and their gradients, are those of rounded numbers, by both recipes; a model
    with them makes steps."""
    from forescale.config.hardware import check_fp8
    from forescale.ground.errors import UserError

    try:
        if at.kind == "cuda":
            check_fp8("rowwise")
    except UserError as e:
        return str(e)
    from forescale.engine.fp8 import fp8_product
    from tests.trainer.engine import test_fp8

    for recipe in test_fp8.RECIPES:
        x, weight, gradient = test_fp8.operands(at.device)
        products = torch.autograd.grad(fp8_product(recipe)(x, weight), (x, weight), gradient)
        assert all(t.dtype == torch.bfloat16 and t.device == x.device for t in products)
        if at.has_values:
            test_fp8.test_the_three_products_are_those_of_rounded_numbers(recipe, at.device)
            test_fp8.test_kernels_and_emulation_agree(recipe, at.device)
        if at.on_gpu:
            train(at, build(at, "precision=bf16", f"precision.fp8={recipe}"), 2)
    return None


def stages(at: Place, precision: str, optimizer: str = "adamw") -> None:
    """Stages 0 to 3 and offloads train like stage 0: losses and norms of four steps; and so do
    divided columns, matrices and a hierarchical partition, where there are several ranks."""
    words = [f"precision={precision}", f"optimizer={optimizer}"]
    ways = [["engine=zero0"], ["engine=zero1"], ["engine=zero2"], ["engine=zero3"]]
    if optimizer == "adamw":
        ways += [["engine=zero2-offload"], ["engine=zero3-offload"]]
    if at.ranks > 1:
        ways += [["engine=zero1", "engine.sequence_parallel=2"],
                 ["engine=zero2", "engine.tensor_parallel=2"]]  # fmt: skip
    if at.ranks > 2:
        ways += [["engine=zero3", "engine.hierarchical_partition=2"]]
        ways += [[f"engine=zero{stage}", "engine.shard_group=2"] for stage in (1, 3)]
    expected = None
    for way in ways:
        rows = train(at, build(at, *words, *way, *PARTS), 4)
        expected = rows if expected is None else expected
        at.close(rows, expected, 1e-4 if precision == "fp32" else 0.02, " ".join(way))


def compiled(at: Place) -> None:
    """Compiled blocks train like uncompiled ones, by the kernels of torch's compiler."""
    plain, rows = (train(at, build(at, "precision=fp32", f"train.compile={compile}"), 4)
                   for compile in ("off", "on"))  # fmt: skip
    at.close(rows, plain, 1e-4)


def fp16(at: Place) -> None:
    """A loss scale that is too large skips steps and halves until gradients are finite; then the
    losses and norms are those of fp32."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # a CPU computes it too, slowly
    for stage in (1, 3):
        engine = build(at, "precision=fp16", f"engine=zero{stage}")
        plain = train(at, build(at, "precision=fp32", f"engine=zero{stage}"), 4)
        at.close(train(at, engine, 4), plain, 0.02, f"stage {stage}")
        engine.layout.optimizer.loss_scaler.cur_scale = 2.0**24
        tries = range(24 if at.has_values else 1)
        applied = [engine.train_step(batch_of(at, engine, 9), 1.0).applied for _ in tries]
        at.holds(lambda a=applied: not a[0] and a[-1], applied)
        at.holds(lambda e=engine: 1 < e.layout.loss_scale < 2**24, "the scale")


def streams(at: Place) -> None:
    """What runs beside the backward pass on streams of its own (reduction at stage 2, gathers and
    reduction at stage 3) gives the bits of one stream."""
    results = {}
    for stage in (2, 3):
        for overlaps in ("true", "false"):
            zero = f"overlap_comm: {overlaps}, stage3_param_persistence_threshold: 50"
            words = (f"engine=zero{stage}", "precision=bf16", PARTS[0])
            engine = build(at, *words, f"engine.deepspeed={{zero_optimization: {{{zero}}}}}")
            results[stage, overlaps] = train(at, engine, 5)
        at.equal(results[stage, "true"], results[stage, "false"], f"stage {stage}")


def copies(at: Place) -> None:
    """A copy for a checkpoint holds the step at which it was taken, though the next steps begin at
    once; batches in pinned memory arrive whole."""
    from forescale.engine.portable.fragments import HostCopy
    from forescale.engine.state import owned_fragments

    for stage in (1, 3):
        engine, host = build(at, f"engine=zero{stage}", "precision=bf16", *PARTS), HostCopy()
        for step in range(2):
            train(at, engine, 2, first=2 * step)
            before = {f.key: f.data.clone() for f in owned_fragments(engine)}
            copied = host.take(owned_fragments(engine))
            train(at, engine, 2, first=10)
            changed = {f.key: f.data for f in owned_fragments(engine)}
            for fragment in copied:
                assert not fragment.data.is_cuda
                if at.on_gpu:
                    assert fragment.data.is_pinned()
                at.equal(fragment.data, before[fragment.key].cpu(), fragment.key)
            key = next(key for key in before if key.endswith("|exp_avg|0"))
            at.holds(lambda a=before[key], b=changed[key]: not torch.equal(a, b), "it has trained")
    micro = batch_of(at, engine, 3).micro[0]
    at.equal(micro.arguments(at.device)[0][1], micro.targets)


def saves(at: Place) -> None:
    """A save in the background, half of which is written after further steps, writes the bytes of
    one that is waited for."""
    from forescale.checkpoint.reader import Position
    from forescale.run.directory import Run
    from tests.trainer import plain_engine as plain

    engine, files, is_trained = build(at, "engine=zero1", "precision=bf16"), [], Event()
    train(at, engine, 2)
    for background in (False, True):  # the first one leaves the engine as it is
        run = Run(at.scratch / f"run-{background}")
        wait = {"midway": lambda *_: is_trained.wait(60)} if background else {}
        saver = plain.saver(run, plain.begin(run), engine, background=background, **wait)
        saver.begin(Position(2, 32, 2048))
        if background:
            train(at, engine, 3, first=2)
            is_trained.set()
        saver.finish()
        path = run.checkpoint_path(2)
        files.append({p.name: p.read_bytes() for p in path.glob("rank-*")})
    assert files[0]
    assert files[0] == files[1]


def resume(at: Place) -> None:
    """A run that is killed and resumed repeats the unbroken one bit for bit: compiled blocks, and
    documents in a row, on a GPU."""
    from tests.launching import whole_and_repeated, whole_and_resumed
    from tests.trainer.small_run import make_dataset

    for name in [n for n in os.environ if n.startswith(_OF_RANKS)]:
        del os.environ[name]  # or `train` would be a rank itself
    data, steps = make_dataset(at.scratch / "data"), 60 if at.on_gpu else 14
    words = ["data=dataset", f"data.path={data}", "train.tokens=null", f"train.steps={steps}"]
    words += ["data.document_mask=true", "engine=zero2", "launch.processes=1"]
    if at.on_gpu:  # a fork of a process that knows CUDA can't use it, so they start cold
        words += ["train.compile=auto", "train.sequence_length=128", "checkpoint.every=10steps"]
        whole, again = whole_and_resumed(at.scratch, *words, step=25, cold=True)
    else:
        words += ["checkpoint.every=4steps"]
        whole, again = whole_and_repeated(at.scratch, *words, step=8)
    assert len(whole) == steps
    assert whole == again


def groups(at: Place) -> None:
    """Each group of the mesh sums over its own ranks; and ranks exchange values, also those of a
    save in the background."""
    from forescale.engine.deepspeed_config import deepspeed_config
    from forescale.engine.world import join

    keys = ["engine.expert_parallel=2", "model.mlp=moe"]
    if at.ranks >= 4:
        keys = ["engine.tensor_parallel=2"]
    keys += [f"train.global_batch={4 * at.ranks}"]
    job = job_of(at, *SMALL, "engine=zero1", "engine.sequence_parallel=2", *keys)
    mesh = job.mesh(at.ranks)
    world = join(deepspeed_config(job, at.ranks), at.ranks, 60, mesh)
    peers = {
        "sequence": mesh.sequence_peers(at.rank), "tensor": mesh.tensor_peers(at.rank),
        "data": mesh.data_peers(at.rank), "states": mesh.state_peers(at.rank),
        "experts": mesh.expert_peers(at.rank), "expert_data": mesh.expert_data_peers(at.rank),
    }  # fmt: skip
    for name, ranks in peers.items():
        group = getattr(world, name)
        assert group.size == len(ranks), name
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            row = torch.full((1000,), at.rank + 1, device=at.device, dtype=dtype)
            expected = torch.full((1000,), sum(rank + 1 for rank in ranks), dtype=dtype)
            at.equal(group.sum(row), expected, f"{name}, {dtype}")
    at.holds(lambda: world.gather(at.rank) == [*range(at.ranks)])
    if at.has_values:
        assert world.in_background("saves").gather(at.rank) == [*range(at.ranks)]
        world.close()


# Shared with the measurements (parts.py)


def job_of(at: Place, *words: str) -> Any:
    """Return the job of these words on the ranks of a place."""
    from dataclasses import replace

    from forescale.config.compose import compose
    from forescale.config.train import TrainJob

    job: Any = compose(TrainJob, [f"run.root={at.scratch}", *words, f"launch.processes={at.ranks}"])
    vocabulary = job.model.vocab_size or VOCABULARY
    return replace(job, model=job.model.resolved(vocabulary, job.train.sequence_length))


def build(at: Place, *words: str) -> Any:
    """Return the engine of a small job."""
    return engine_of(at, job_of(at, *SMALL, f"train.global_batch={4 * at.ranks}", *words))


def engine_of(at: Place, job: Any) -> Any:
    """Return the engine of a job, built as a rank builds it, with the job as its `job`."""
    from forescale.engine.compilation import compilation
    from tests.distributed.jobs import build_job

    _use_kernels(at, job.train.deterministic)
    engine = build_job(job)
    assert engine.world.device == at.device, engine.world.device
    chosen = compilation(job, at.ranks, at.device.type)
    if chosen.enabled:
        engine.compile(chosen.by_part, chosen.budget)
    engine.job = job
    return engine


def batch(at: Place, job: Any, ranks: Any, step: int) -> Any:
    """Return the part of one of `ranks` in a step: the same random windows for any number."""
    from forescale.data.stream import MicroBatch

    rows, length = job.train.micro_batch, job.train.sequence_length
    count = job.train.global_batch // (rows * ranks.size)
    windows = _tokens((count * ranks.size, rows, length + 1), job.model.vocab_size, seed=step)
    total, micro = count * ranks.size, []
    for i in range(ranks.rank * count, (ranks.rank + 1) * count):
        one = MicroBatch(i, *(windows[i, :, j : j + length].contiguous() for j in (0, 1)))
        micro.append(one.pinned() if at.on_gpu else one)
    targets = windows[..., 1:].numel()
    return SimpleNamespace(step=step, targets=targets, micro=micro, micro_batches=total)


def batch_of(at: Place, engine: Any, step: int) -> Any:
    """Return this rank's part of a step."""
    return batch(at, engine.job, engine.world.data, step)


def train(at: Place, engine: Any, steps: int, first: int = 0) -> Tensor:
    """Make steps, without values one; return the mean loss and the norm of each, in fp64."""
    rows = []
    for step in range(first, first + (steps if at.has_values else 1)):
        data = batch_of(at, engine, step)
        norm = make_step(engine, data)
        for summary in engine.world.summaries(behind=0):
            rows.append([sum(summary.losses) / data.targets, norm])
    return torch.tensor(rows, dtype=torch.float64)


def make_step(engine: Any, data: Any) -> float:
    """Make a step as the loop does, without reading its summary. Return the norm."""
    facts, world = engine.train_step(data, 1.0), engine.world
    first, count = data.micro[0].index, len(data.micro) * world.data.size
    world.share(data.step, facts.losses, first, count, 0, False, False, facts.extra)
    return facts.grad_norm


def _use_kernels(at: Place, deterministic: bool = True) -> None:
    from forescale.engine.determinism import use_kernels

    use_kernels(deterministic, at.on_gpu)
    torch.backends.cudnn.allow_tf32 = False  # of an LSTM in fp32, whose oracle is the CPU


def _tokens(shape: tuple[int, ...], vocabulary: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(0, vocabulary, shape, generator=generator)
