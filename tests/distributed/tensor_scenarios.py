"""Scenarios on real ranks that divide the matrices of a model."""

VOCABULARY, LENGTH = 98, 32


def parts(cases):
    """For each [words of the model, compiled]: the largest difference of this rank's losses and
    gradients from those of the whole model, relative to their norm, over all ranks."""
    import torch
    import torch._dynamo.config as dynamo
    import torch.distributed as dist

    from forescale.engine.parallel.tensor import divide
    from forescale.models import Transformer
    from forescale.models.config import ModelConfig
    from forescale.models.parallel.tensor import TensorGroup
    from forescale.models.parallel.whole import whole_of

    dynamo.disable = False
    dist.init_process_group("gloo")
    group = TensorGroup(dist.get_rank(), dist.get_world_size(), dist.group.WORLD.group_name)
    found = []
    for words, compiled in cases:
        config = ModelConfig(**{**SMALL, **words})
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            models.append(Transformer(config).train())
        whole, part = models[0], divide(models[1], group)
        if compiled:
            for module in part.compiled_parts():
                module.forward = torch.compile(module.forward, backend="aot_eager", fullgraph=True)
        generator = torch.Generator().manual_seed(1)
        tokens, targets = torch.randint(0, VOCABULARY - 1, (2, 2, LENGTH), generator=generator)
        targets[0, -3:] = -100
        losses = [_backward(model, tokens, targets) for model in models]
        pairs = [(losses[0], losses[1])]
        for own, p in zip(part.parameters(), whole.parameters(), strict=True):
            whole = whole_of(own)
            pairs.append((p.grad.chunk(whole.parts, whole.dim)[whole.part], own.grad))
        worst = max(float((a - b).norm() / a.norm().clamp_min(1e-12)) for a, b in pairs)
        every = [None] * group.size
        dist.all_gather_object(every, worst)
        found.append(max(every))
    return found


def _backward(model, tokens, targets):
    found = model(tokens, targets)
    losses, penalty = found if isinstance(found, tuple) else (found, 0.0)
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
