"""Which kernels train.deterministic allows on which device, and what becomes of a refused one.

No GPU runs here: what is shown is which modes are set in torch, and what a CPU does with them.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from forescale.config.hardware import exactness
from forescale.engine import determinism
from forescale.engine.determinism import (
    as_refused,
    attention_backends,
    mode_of,
    set_compiler_mode,
    use_flash,
    use_kernels,
)
from forescale.ground.errors import UserError
from forescale.models import Transformer
from tests.models.configs import model_config

FLASH, MATH = SDPBackend.FLASH_ATTENTION, SDPBackend.MATH
EFFICIENT, CUDNN = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION


@pytest.fixture(autouse=True)
def fresh_torch(monkeypatch):
    """Torch as it was before."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


@pytest.mark.parametrize(
    ("deterministic", "on_gpu", "mode", "backends"),
    [
        (True, True, "error", {FLASH, EFFICIENT, MATH}),
        (False, True, "default", {FLASH, EFFICIENT, MATH, CUDNN}),
        (True, False, "error", {FLASH, MATH}),
        (False, False, "warn", {FLASH, MATH}),
    ],
)
def test_kernels_of_each_choice(deterministic, on_gpu, mode, backends):
    assert mode_of(deterministic, on_gpu) == mode
    assert attention_backends(deterministic, on_gpu) == backends
    # warn_only leaves flash attention's backward as it is: no promise on a GPU may rest on it.
    assert exactness(deterministic, on_gpu).holds == (mode == "error" or not on_gpu)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("on_gpu", [True, False])
def test_torch_and_its_compiler_have_the_same_mode(deterministic, on_gpu):
    import torch._inductor.config as inductor

    use_kernels(deterministic, on_gpu)
    mode = mode_of(deterministic, on_gpu)
    for _ in range(2):  # before and after the mode of the compiler is set
        assert torch.are_deterministic_algorithms_enabled() == (mode != "default")
        assert torch.is_deterministic_algorithms_warn_only_enabled() == (mode == "warn")
        set_compiler_mode()
    assert inductor.deterministic == (mode != "default")
    backends = attention_backends(deterministic, on_gpu)
    assert torch.backends.cuda.cudnn_sdp_enabled() == (CUDNN in backends)


def test_another_flash_attention_needs_its_gpu_and_its_package(monkeypatch):
    torch.backends.cuda.enable_cudnn_sdp(True)
    use_flash("torch", on_gpu=False)
    with pytest.raises(UserError, match="fa3: is for a GPU of the kind Hopper"):
        use_flash("fa3", on_gpu=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    with pytest.raises(UserError, match="fa3: is for a GPU of the kind Hopper"):
        use_flash("fa3", on_gpu=True)
    with pytest.raises(UserError, match="fa4: torch can't use the package flash-attn-4"):
        use_flash("fa4", on_gpu=True)
    names: list[str] = []
    monkeypatch.setattr(determinism, "activate_flash_attention_impl", names.append)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    use_flash("fa4", on_gpu=True)
    assert names == ["FA4"]
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(
    "words",
    [
        dict(mlp="moe", dropout=0.1, position="relative"),
        dict(mixer="window", mixer__window=4),
        *(dict(mixer=name) for name in ("gated_deltanet", "latent", "mingru", "lstm")),
    ],
)
def test_our_models_train_in_the_raising_form(words):
    """And so twice to the same bits; what only CUDA refuses is listed in the module."""
    use_kernels(True, on_gpu=False)
    sizes = dict(num_layers=2, width=32, num_heads=2, vocab_size=50, max_sequence_length=16)
    model = Transformer(model_config(**sizes, **words))
    tokens = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(0))

    def gradients():
        torch.manual_seed(0)
        output = model(tokens[:, :-1], tokens[:, 1:])
        losses, penalty = output if isinstance(output, tuple) else (output, 0.0)
        return torch.autograd.grad(losses.sum() + penalty, [*model.parameters()], allow_unused=True)

    for a, b in zip(gradients(), gradients(), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_an_operation_without_such_a_kernel_is_named_with_the_key():
    """put_ is one that a CPU refuses too."""
    x, index = torch.zeros(4), torch.tensor([0, 0])
    use_kernels(True, on_gpu=False)
    with pytest.raises(RuntimeError) as caught:
        x.put_(index, torch.ones(2))
    refused = as_refused(caught.value)
    assert refused is not None
    assert "train.deterministic=true: the model uses put_" in str(refused)
    assert "set train.deterministic=false" in str(refused)
    use_kernels(False, on_gpu=False)
    with pytest.warns(UserWarning, match="put_"):
        x.put_(index, torch.ones(2))
    assert as_refused(RuntimeError("out of memory")) is None
    assert as_refused(ValueError("x does not have a deterministic implementation")) is None


def test_attention_takes_only_backends_that_are_listed():
    """A CPU has two kernels, and refuses the others."""
    q = torch.randn(1, 2, 8, 4)
    for backend in attention_backends(True, on_gpu=False):
        with torch.nn.attention.sdpa_kernel(backend):
            F.scaled_dot_product_attention(q, q, q, is_causal=True)
    with (
        torch.nn.attention.sdpa_kernel([EFFICIENT, CUDNN]),
        pytest.raises(RuntimeError, match=r"(?i)no (viable|available) (backend|kernel)"),
    ):
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
