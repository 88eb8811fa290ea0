"""What the layouts change in DeepSpeed's optimizers, on stand-ins for them."""

from types import SimpleNamespace

import pytest
import torch

from forescale.engine.stages import Zero3, Zero12


class Gradient:
    """A gradient on a GPU, which notes the streams that its memory waits for."""

    is_cuda = True

    def __init__(self, size):
        self.waits_for, self.size = [], size

    def numel(self):
        return self.size

    def record_stream(self, stream):
        self.waits_for.append(stream)


def optimizer(beside, averaged):
    return SimpleNamespace(
        cpu_offload=True,
        overlap_comm=beside,
        reduction_stream="the reduction's",
        reduce_bucket_size=10,
        average_tensor=lambda tensor, dtype: averaged.append((tensor, dtype)),
    )


def test_a_gradient_that_another_stream_reduces_keeps_its_memory():
    for beside, size, waits_for in (
        (True, 11, ["the reduction's"]),
        (True, 10, []),
        (False, 11, []),
    ):
        averaged, gradient = [], Gradient(size)
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


@pytest.mark.parametrize("stage", [2, 3])
def test_streams_wait_for_the_reduction_before_a_bucket_is_freed_and_the_host_does_not(
    stage, monkeypatch
):
    from deepspeed.accelerator import get_accelerator

    log: list[str] = []
    names = ("main", "hook", "reducing", "gathering")
    main, hook, reducing, gathering = (Stream(name, log) for name in names)
    waits = get_accelerator() if stage == 2 else reducing

    def end():
        waits.synchronize()
        log.append("freed")

    o = SimpleNamespace(
        cpu_offload=False,
        offload_optimizer=False,
        offload_param=False,
        overlap_comm=True,
        contiguous_gradients=True,
        ready_for_gradients=False,
        reduction_stream=reducing,
        reduce_and_partition_stream=reducing,
        independent_gradient_partition_epilogue=end,
        setup_buckets=lambda: None,
        parameter_offload=SimpleNamespace(_DeepSpeedZeRoOffload__allgather_stream=gathering),
        _post_step=lambda names: get_accelerator().synchronize(),
        **dict.fromkeys(("average_tensor", "get_flat_partition", "unscale_and_clip_grads")),
        **dict.fromkeys(("_get_norm_groups", "_partitioned_buffers_all_gather")),
    )
    layout = {2: Zero12, 3: Zero3}[stage]
    layout(SimpleNamespace(optimizer=o, basic_optimizer=None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: hook)
    o.setup_buckets()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    o.independent_gradient_partition_epilogue()
    readers = ["main", "hook"] if stage == 2 else ["main"]
    assert log == [*(f"{reader} waits for reducing" for reader in readers), "freed"]
    assert "synchronize" not in vars(waits)
    if stage == 3:  # the next weights are gathered behind the update
        o._post_step(set())
        assert log[-1] == "gathering waits for main"
