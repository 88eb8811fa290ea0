"""What runs inside the ranks of test_columns.py: models whose columns ranks divide, without an
engine, beside the same model with whole rows; attention in a ring beside dense attention."""

import torch
import torch.distributed as dist

from tests.distributed.jobs import VOCABULARY

LENGTH = 24


def groups(sequence, runs):
    """The group of all ranks, of which `sequence` exchange heads."""
    from forescale.models.parallel.groups import Group, SequenceGroup

    rank, size = dist.get_rank(), dist.get_world_size()
    rows = [range(i, i + sequence) for i in range(0, size, sequence)]
    rings = [range(i, size, sequence) for i in range(sequence)]
    parts = []
    for peers in (rows, rings):  # every rank makes each group
        every = {tuple(p): dist.new_group(list(p)) for p in peers}
        (group,) = (g for p, g in every.items() if rank in p)
        parts.append(Group(dist.get_rank(group), dist.get_world_size(group), group.group_name))
    return SequenceGroup(rank, size, dist.group.WORLD.group_name, *parts, runs)


def batch(documents, padding):
    generator = torch.Generator().manual_seed(3)
    data = torch.randint(0, VOCABULARY, (2, LENGTH + 1), generator=generator)
    tokens, targets, named = data[:, :-1], data[:, 1:].clone(), {}
    targets[0, -7:] = -100
    if documents:
        begins = torch.rand(tokens.shape, generator=generator) < 0.2
        named["documents_BL"] = begins.cumsum(-1).int()
    if padding:
        real = torch.ones_like(tokens, dtype=torch.bool)
        real[1, -5:] = False
        targets[1, -5:] = -100
        named["padding_mask_BL"] = real
    return tokens, targets, named


def gradients(cases, sequence):
    """For each case, words of a model with "documents" or "padding", the largest difference of its
    losses, its logits and gradients from those of whole rows, over the largest of each gradient."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return [_errors(case, sequence) for case in cases]


def _errors(case, sequence):
    from forescale.config.compose import compose
    from forescale.config.train import TrainJob
    from forescale.models import Transformer
    from forescale.models.parallel.division import of_columns, runs

    flags = {"documents", "padding"} & set(case)
    words = [
        "model.width=32",
        "model.num_layers=2",
        "model.mlp_width=41",
        f"train.sequence_length={LENGTH}",
        "train.steps=9",
        "precision=fp32",
    ]
    words += [] if {"model.mixer=mingru", "model.mixer=lstm"} & set(case) else ["model.num_heads=4"]
    job = compose(TrainJob, [*words, *(word for word in case if word not in flags)])
    config, context = job.model.resolved(VOCABULARY, LENGTH), dist.get_world_size() // sequence
    assert not (refused := of_columns(config, LENGTH, sequence, context)), refused
    results = []
    tokens, targets, named = batch("documents" in flags, "padding" in flags)
    for divided in (False, True):
        torch.manual_seed(0)
        model = Transformer(config)
        for name, parameter in model.named_parameters():
            if "shift" in name or not parameter.detach().any():  # else it would have no part
                torch.nn.init.normal_(parameter, 0, 0.3)
        if divided:
            group = groups(sequence, runs(config, context))
            model.divide(group)
        output = model(tokens, targets, **named)
        losses, penalty = output if isinstance(output, tuple) else (output, 0.0)
        (losses.sum() + penalty).backward()
        everything = {n: p.grad for n, p in model.named_parameters()} | {"losses": losses.detach()}
        if divided:
            for tensor in everything.values():
                dist.all_reduce(tensor)
        with torch.no_grad():
            everything["logits"] = model.eval()(tokens[:, :12], None)
        results.append(everything)
    whole, parts = results
    columns = torch.arange(12)
    whole["logits"] = whole["logits"][:, group.columns(columns)]
    errors = {
        name: float((parts[name] - x).abs().max() / x.abs().max().clamp(min=1e-3))
        for name, x in whole.items()
    }
    worst = max(errors, key=errors.get)
    return errors[worst], worst


def attends(seeds):
    """For each seed the largest difference of a ring's attention, and of its gradients, from dense
    attention by a mask that a loop over all pairs makes."""
    dist.init_process_group("gloo")
    return [_ring_error(seed) for seed in seeds]


def _ring_error(seed):
    from forescale.models.mixers.ring import _attention
    from forescale.models.positions.position import document_starts

    draw = torch.Generator().manual_seed(seed)
    n, rank = dist.get_world_size(), dist.get_rank()

    def pick(*values):
        return values[int(torch.randint(len(values), (1,), generator=draw))]

    causal = pick(True, True, False)
    runs, kv_heads, length = pick(1, 2) if causal else 1, pick(1, 2, 4), 2 * n * pick(1, 3, 8)
    window = pick(0, 1, 3, 2 * length) if causal else 0
    first_tokens, alibi = pick(0, 0, 2) if window else 0, causal and pick(False, True)
    real = starts = slopes = None
    if pick(False, True):
        begins = torch.rand(2, length, generator=draw) < 0.3
        starts = document_starts(begins.cumsum(-1))
    elif pick(False, True):
        real = torch.arange(length) < torch.tensor([[length], [max(1, length // 3)]])
    if alibi:
        slopes = torch.rand(4, generator=draw)
    shapes = [(2, length, heads, 8) for heads in (4, kv_heads, kv_heads, 4)]
    q, k, v, d_out = (torch.randn(shape, generator=draw) for shape in shapes)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if real is not None:
        d_out[~real] = 0  # the outputs of padding are undefined

    bias = torch.full((2, 4, length, length), -torch.inf)
    for b in range(2):
        for i in range(length):
            for j in range(length):
                begin = 0 if starts is None else int(starts[b, j])
                near = not window or i - j < window or j - begin < first_tokens
                same = starts is None or starts[b, i] == starts[b, j]
                is_real = real is None or bool(real[b, j])
                ordered = not causal or j <= i
                if ordered and near and same and (is_real or i == j):
                    bias[b, :, i, j] = 0 if slopes is None else slopes * (j - i)
    heads = [x.repeat_interleave(4 // kv_heads, 2).transpose(1, 2) for x in (k, v)]
    scores = torch.einsum("blhk,bhsk->bhls", q, heads[0]) * 0.3
    dense = ((scores + bias).softmax(-1) @ heads[1]).transpose(1, 2)
    expected = torch.autograd.grad(dense, leaves, d_out)

    size = length // (n * runs)
    numbers = (rank, 2 * n - 1 - rank)[:runs]
    mine = torch.cat([torch.arange(size * m, size * (m + 1)) for m in numbers])
    parts = [x.detach()[:, mine].requires_grad_() for x in leaves]
    order = [rank, n, runs, int(causal), window, first_tokens]
    name = dist.group.WORLD.group_name
    out, _ = _attention(*parts, starts, real, slopes, 0.3, order, name)
    gradients = torch.autograd.grad(out, parts, d_out[:, mine])
    rows = torch.ones(2, len(mine), dtype=torch.bool) if real is None else real[:, mine]
    pairs = [(out[rows], dense[:, mine][rows])]
    pairs += [(x, y[:, mine]) for x, y in zip(gradients, expected, strict=True)]
    error = torch.stack([(x - y).abs().max() for x, y in pairs]).max()
    dist.all_reduce(error, dist.ReduceOp.MAX)
    return float(error)
