"""Our loop against transformers' Trainer on the same work: the architecture of the default model
as transformers has it, the same windows in memory, fused AdamW, clipping, torch.compile, and the
number format that this machine multiplies fast.

Each is in a process of its own (both claim Accelerate's global state); they still take turns.
"""

import tempfile
from pathlib import Path

from forescale.config.hardware import native_precision
from tests.benchmarks.pairing import Clocks, Result, by_both_clocks, interleaved
from tests.benchmarks.processes import Side
from tests.benchmarks.sizes import TOY_TRAINING, TrainingSizes

REAL, TOY = TrainingSizes(), TOY_TRAINING
SAME = ("optimizer=adamw",)


def measure(rounds: int, sizes: TrainingSizes = REAL) -> list[Result]:
    with Side(product, sizes, *SAME) as a, Side(rival, sizes, (rounds + 1) * sizes.steps) as b:
        rows = interleaved(rounds, a, b)
    name = f"peer, adamw, {native_precision()}"
    return by_both_clocks(name, ("ours", "HF Trainer"), rows, "at least 1.3")


def product(turn, sizes: TrainingSizes, *overrides: str) -> None:
    """Our loop over the job with these overrides, in turns."""
    from tests.benchmarks.training import Product, make_job

    with tempfile.TemporaryDirectory() as folder:
        loop = Product(make_job(Path(folder), sizes, *overrides))
        turn()
        clocks, tokens = Clocks(), sizes.steps * loop.rank.job.tokens_per_step
        while True:
            clocks.begin()
            loop(sizes.steps)
            turn(clocks.rates(tokens))


def rival(turn, sizes: TrainingSizes, steps: int) -> None:
    """transformers.Trainer for so many steps. In bf16 weights are fp32 under autocast, as
    it does that."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

    from forescale.models.config import ModelConfig
    from forescale.models.hf import to_hf
    from forescale.run.start import open_sources, settle
    from forescale.train.model import build_model
    from tests.benchmarks.training import batches, make_job

    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder), sizes, *SAME)
        sources = open_sources(job.data)
        job = settle(job, sources)
        assert isinstance(job.model, ModelConfig)
        batch_list = batches(job, sources, 64)
        config, tensors = to_hf(job.model, build_model(job, sources.vocab_size).state_dict())
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        model.load_state_dict(dict(tensors))
        o, batch = job.optimizer, job.train.global_batch
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            use_cpu=not torch.cuda.is_available(),
            bf16=job.precision.kind == "bf16",
            torch_compile=job.train.compile != "off",
            optim="adamw_torch_fused",
            learning_rate=o.learning_rate,
            adam_beta1=o.beta1,
            adam_beta2=o.beta2,
            adam_epsilon=o.eps,
            weight_decay=o.weight_decay,
            max_grad_norm=o.clip or 0.0,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=50,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=job.train.seed,
        )
        rows = [row for b in batch_list for micro in b.micro for row in micro.tokens]
        windows = [{"input_ids": row, "labels": row} for row in rows]
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=[windows[i % len(windows)] for i in range(steps * batch)],
            callbacks=[_taking_turns(turn, sizes.steps, job.tokens_per_step)],
        )
        trainer.train()


def _taking_turns(turn, steps: int, tokens: int):
    from transformers import TrainerCallback

    class TakingTurns(TrainerCallback):
        """Stops the loop after every `steps` until it is its turn again. tokens: of a step."""

        def on_train_begin(self, *_, **__):
            turn()
            self.clocks = Clocks()

        def on_step_end(self, args, state, control, **_):
            if state.global_step % steps == 0:
                turn(self.clocks.rates(steps * tokens))
                self.clocks.begin()

    return TakingTurns()
