"""Scenarios on real ranks that divide the matrices of a model."""

from functools import partial

VOCABULARY, LENGTH = 98, 32


def parts(cases):
    """For each [words of the model, compiled, parts of a sum]: the largest difference of this
    rank's losses and gradients from those of the whole model, relative to their norm, over all
    ranks."""
    import torch
    import torch._dynamo as dynamo
    import torch.distributed as dist

    from forescale.engine.parallel.tensor import divide
    from forescale.models import Transformer
    from forescale.models.parallel.groups import TensorGroup
    from forescale.models.parallel.whole import whole_of
    from tests.models.configs import model_config

    dynamo.config.disable = False
    dist.init_process_group("gloo")
    place = dist.get_rank(), dist.get_world_size(), dist.group.WORLD.group_name
    results = []
    for words, compiled, chunks in cases:
        group = TensorGroup(*place, chunks)
        config = model_config(**{**SMALL, **words})
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            models.append(Transformer(config).train())
        whole, part = models[0], divide(models[1], group)
        if compiled:
            dynamo.reset()  # it counts how often it has compiled a block
            for module in part.compiled_parts():
                module.forward = torch.compile(module.forward, backend="aot_eager", fullgraph=True)
        generator = torch.Generator().manual_seed(1)
        tokens, targets = torch.randint(0, VOCABULARY - 1, (2, 2, LENGTH), generator=generator)
        targets[0, -3:] = -100
        losses = [_backward(model, tokens, targets) for model in models]
        pairs = [(losses[0], losses[1])]
        for part_p, p in zip(part.parameters(), whole.parameters(), strict=True):
            whole = whole_of(part_p)
            pairs.append((p.grad.chunk(whole.parts, whole.dim)[whole.part], part_p.grad))
        worst = max(float((a - b).norm() / a.norm().clamp_min(1e-12)) for a, b in pairs)
        every = [None] * group.size
        dist.all_gather_object(every, worst)
        results.append(max(every))
    return results


def everything(cases, drops):
    """What `parts` finds for the cases, and what `dropped` finds for the words of a model."""
    return {"parts": parts(cases), "dropped": [dropped(words) for words in drops]}


def dropped(words):
    """Two forward and backward passes of a model with dropout, from the same seed. The first half
    of its heads has the same weights as the second: what ranks compute of theirs differs by
    dropout alone.

    Returns the tensors of which ranks have not the same bits, how many values of the heads' outputs
    are the same on two ranks, without and with dropout, and whether both passes drew the same.
    """
    import torch
    import torch.distributed as dist

    from forescale.engine.parallel.tensor import divide
    from forescale.models import Transformer
    from forescale.models.parallel.groups import TensorGroup
    from tests.models.configs import model_config

    group = TensorGroup(dist.get_rank(), dist.get_world_size(), dist.group.WORLD.group_name)
    torch.manual_seed(0)
    model = divide(Transformer(model_config(**{**SMALL, "dropout": 0.3, **words})), group)
    mixer, masks_seen = model.blocks[0].mixer, {}
    for p in mixer.parameters():  # those of the first rank on all
        dist.broadcast(p.data, 0)
    mixer.output.register_forward_pre_hook(
        lambda _, x: masks_seen.__setitem__("heads", x[0].detach())
    )
    for i, block in enumerate(model.blocks):
        keep = partial(
            lambda name, _, __, y: masks_seen.__setitem__(name, y.detach()), f"stream.{i}"
        )
        block.register_forward_hook(keep)
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH) % VOCABULARY
    passes = []
    for training in (True, True, False):
        model.train(training).zero_grad()
        torch.manual_seed(3)
        losses = model(tokens, tokens)
        losses.sum().backward()
        whole = {n: p.grad for n, p in model.named_parameters() if not hasattr(p, "whole")}
        passes.append({**masks_seen, "losses": losses.detach(), "after": torch.rand(9), **whole})
    differ = set()
    for masks in passes[1:]:
        for name, tensor in masks.items():
            every = [torch.empty_like(tensor) for _ in range(group.size)]
            dist.all_gather(every, tensor.contiguous())
            if name != "heads" and not torch.equal(*every):
                differ.add(name)
            elif name == "heads":
                passes.append(float((every[0] == every[1]).float().mean()))
    again = all(torch.equal(passes[0][name], passes[1][name]) for name in passes[0])
    return sorted(differ), passes[-1], passes[-2], again


def _backward(model, tokens, targets):
    output = model(tokens, targets)
    losses, penalty = output if isinstance(output, tuple) else (output, 0.0)
    (losses.sum() + penalty).backward()
    return losses.detach()


SMALL = {
    "width": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": VOCABULARY,
    "max_sequence_length": LENGTH,
}
