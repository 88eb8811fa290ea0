"""What the layouts change in DeepSpeed's optimizers, on stand-ins for them."""

from types import SimpleNamespace

import torch

from forescale.engine.stages import Zero3, Zero12


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


class Stream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


def test_at_stage_3_streams_wait_for_the_reduction_and_the_host_does_not(monkeypatch):
    from deepspeed.accelerator import get_accelerator

    log: list[str] = []
    main, reducing, gathering = (Stream(name, log) for name in ("main", "reducing", "gathering"))

    def end():
        reducing.synchronize()
        log.append("freed")

    o = SimpleNamespace(
        offload_optimizer=False,
        offload_param=False,
        contiguous_gradients=True,
        reduce_and_partition_stream=reducing,
        independent_gradient_partition_epilogue=end,
        parameter_offload=SimpleNamespace(_DeepSpeedZeRoOffload__allgather_stream=gathering),
        _post_step=lambda names: get_accelerator().synchronize(),
        use_muon=False,
        _get_norm_groups=None,
        unscale_and_clip_grads=None,
    )
    Zero3(SimpleNamespace(optimizer=o, basic_optimizer=None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    o.independent_gradient_partition_epilogue()
    assert log == ["main waits for reducing", "freed"]
    assert "synchronize" not in vars(reducing)
    o._post_step(set())  # the next weights are gathered behind the update
    assert log[-1] == "gathering waits for main"
