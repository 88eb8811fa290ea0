"""Classes of transformers on two real ranks: each kind goes on to the bit after a kill, and leaves
as what the library loads. The ZeRO stages are dealt to the kinds."""

import pytest
import torch

from forescale import cli, open_run
from tests import launching
from tests.models.hf.kinds import save_config

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

LENGTH = ("train.tokens=null", "train.steps=20", "checkpoint.every=5", "validation.every=20")
CHOSEN = {
    "mistral": 0,
    "phi": 1,
    "gpt_neox": 2,
    "falcon": 3,
    "bloom": 1,
    "opt": 3,  # with dropout, and activations that are computed again
    "gemma2": 2,
    "olmoe": 3,  # a penalty
    "gpt_oss": 1,
    "deepseek_v3": 3,
    "qwen3_next": 2,
    "mamba": 3,
    "bert": 0,
    "t5": 2,
}


@pytest.mark.parametrize("kind", CHOSEN)
def test_a_class_goes_on_to_the_bit_and_leaves_as_itself(kind, dataset, tmp_path):
    model = ("model=transformers", f"model.name={save_config(kind, tmp_path / 'config')}")
    command = (f"data.path={dataset}", *LENGTH, f"engine=zero{CHOSEN[kind]}", "launch.processes=2")
    command += {"bert": ("objective=masked",), "t5": ("objective=prefix",)}.get(kind, ())
    model += ("model.activation_checkpointing=full",) if kind == "opt" else ()
    whole, cut = launching.whole_and_resumed(tmp_path, *command, step=12, model=model)
    assert cut == whole
    losses = [row["loss"] for row in whole]
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    assert cli.main(["export", str(tmp_path / "cut"), f"to={tmp_path / 'hf'}"]) == 0
    auto = {"bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}
    auto_class = getattr(transformers, auto.get(kind, "AutoModelForCausalLM"))
    exported = auto_class.from_pretrained(tmp_path / "hf").eval()
    tokens, rest = torch.arange(24)[None], {}
    model = open_run(tmp_path / "whole").model()
    if kind == "t5":
        tokens, rest = tokens[:, : model.split], {"decoder_input_ids": tokens[:, model.split :]}
    with torch.no_grad():
        assert torch.equal(exported(tokens, **rest).logits, model(torch.arange(24)[None]))


def test_adapters_of_a_class_go_on_to_the_bit_and_leave_all_else_as_it_was(dataset, tmp_path):
    model = ("model=transformers", f"model.name={save_config('t5', tmp_path / 'config')}")
    command = (f"data.path={dataset}", *LENGTH, "launch.processes=2", "objective=prefix")
    command += ("precision=fp32",)  # frozen weights are held in that of the engine
    launching.train(tmp_path, *command, "run.name=base", model=model)
    command += ("engine=zero3", "lora.rank=4", "optimizer=adamw", "run.from.load=weights")
    command += (f"run.from.run={tmp_path / 'base'}",)
    whole, cut = launching.whole_and_resumed(tmp_path, *command, step=12, model=model)
    assert cut == whole
    base, adapted = (open_run(tmp_path / name).checkpoint() for name in ("base", "cut"))
    ups = [name for name in adapted.shapes if name.endswith("lora_B.weight")]
    assert len(ups) == 2 * 7 + 2 * 11  # of the encoder's layers and the decoder's
    assert all(adapted.tensor(name).abs().max() > 0 for name in ups)
    assert all(torch.equal(adapted.tensor(name), base.tensor(name)) for name in base.shapes)
