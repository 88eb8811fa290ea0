"""What the layouts change in DeepSpeed's optimizers, on stand-ins for them."""

from types import SimpleNamespace

import torch

from forescale.engine.stages import Zero12


class Gradient:
    """A gradient on a GPU, which notes the streams that its memory waits for."""

    is_cuda = True

    def __init__(self):
        self.waits_for = []

    def record_stream(self, stream):
        self.waits_for.append(stream)


def optimizer(beside, averaged):
    return SimpleNamespace(
        cpu_offload=True,
        overlap_comm=beside,
        reduction_stream="the reduction's",
        average_tensor=lambda tensor, dtype: averaged.append((tensor, dtype)),
    )


def test_a_gradient_that_another_stream_reduces_keeps_its_memory():
    for beside, waits_for in ((True, ["the reduction's"]), (False, [])):
        averaged, gradient = [], Gradient()
        o = optimizer(beside, averaged)
        Zero12(SimpleNamespace(optimizer=o, basic_optimizer=None))
        o.average_tensor(gradient, torch.float32)
        assert averaged == [(gradient, torch.float32)]
        assert gradient.waits_for == waits_for
