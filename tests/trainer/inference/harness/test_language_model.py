"""A run asked by lm_eval: what lm_eval's own HFLM gets of the exported model."""

import json
import math

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from forescale import open_run
from forescale.ground.errors import UserError
from tests.trainer.inference.harness.task_files import make_tasks
from tests.trainer.inference.test_importing import model_of, write
from tests.trainer.small_run import make_run

lm_eval = pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")

SIZES = ["model.num_layers=2", "model.width=32", "model.num_heads=2", "model.mixer.qk_norm=none"]
LEARNED = ["model.position=learned", "model.norm=layernorm", "model.mlp=gelu", "model.bias=true"]
TURNS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
RUNS = {"rotary": ["model.mlp=swiglu"], "learned": [*LEARNED, "model.tie_embeddings=true"]}


def evaluated(model, tasks, shots, **how):
    """What lm_eval's evaluate finds, with lm_eval's own reading of the task files."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_defaults=False).load([*map(str, tasks)])
    for task in loaded["tasks"].values():
        task.set_config("num_fewshot", shots if task.get_config("num_fewshot") is None else 0)
        task.set_fewshot_seed(1234)
    return evaluate(model, loaded, bootstrap_iters=0, **how)


def hflm_of(folder):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), batch_size=4, device="cpu", dtype="float32")


def answers_of(results):
    """What the model said, a list of texts or likelihoods for each question."""
    return {
        name: [sample["filtered_resps"] for sample in samples]
        for name, samples in results["samples"].items()
    }


def assert_alike(actual, expected):
    """The same texts, likelihoods to 1e-4, and the metrics that follow."""
    answers, right = answers_of(actual), answers_of(expected)
    assert answers["answer"] == right["answer"]
    for one, other in zip(answers["choice"], right["choice"], strict=True):
        assert [is_greedy for _, is_greedy in one] == [is_greedy for _, is_greedy in other]
        assert [nats for nats, _ in one] == pytest.approx([n for n, _ in other], abs=1e-4)
    for one, other in zip(answers["rolling"], right["rolling"], strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    for name, numbers in expected["results"].items():
        for key, value in numbers.items():
            if isinstance(value, float) and math.isfinite(value):
                assert actual["results"][name][key] == pytest.approx(value, rel=1e-5), (name, key)


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_scores_as_its_export_does_by_lm_eval_alone(kind, small_data, tmp_path, forescale):
    """Multiple choice, an answer and a rolling likelihood, of texts that fit and that don't; also
    of a checkpoint in the midst of the run."""
    run = make_run(small_data, tmp_path / "runs", kind, *SIZES, *RUNS[kind])
    assert forescale("export", run.path, "step=4", f"to={tmp_path / 'hf'}")[0] == 0
    tasks = make_tasks(tmp_path / "tasks").values()
    model = open_run(run.path).language_model(step=4, batch=3)
    actual, expected = (evaluated(m, tasks, 1) for m in (model, hflm_of(tmp_path / "hf")))
    assert set(model.cut_tokens) == {"choice", "answer"}  # windows of the third always fit
    assert len({nats for one in answers_of(actual)["choice"] for nats, _ in one}) > 12
    assert_alike(actual, expected)


def test_an_import_is_read_with_its_own_first_token_and_chat_template(tmp_path, forescale):
    """As HFLM reads the directory that it came from; with an empty context too."""
    folder = write(model_of("Llama"), tmp_path / "llama")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>"])
    begin = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[begin])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = json.loads((folder / "tokenizer_config.json").read_text())
    names |= {"bos_token": "<s>", "chat_template": TURNS}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    assert forescale("import", "hf", folder, "it", f"run.root={tmp_path}")[0] == 0
    model, hflm = open_run(tmp_path / "it").language_model(), hflm_of(folder)
    assert model.tok_encode("ab") == hflm.tok_encode("ab") == [begin[1], *b"ab"]
    assert model.tok_encode("<s>ab") == hflm.tok_encode("<s>ab") == [begin[1], *b"ab"]
    tasks = make_tasks(tmp_path / "tasks", rows=4).values()
    for shots, how in ((0, {}), (1, dict(apply_chat_template=True, fewshot_as_multiturn=True))):
        actual, expected = (evaluated(m, tasks, shots, **how) for m in (model, hflm))
        assert_alike(actual, expected)
    (requests, _), *_ = actual["samples"]["choice"][0]["arguments"]
    assert requests.startswith("<s>[user]")  # and [assistant], and the question after the example
    assert requests.count("[user]") == 2


def test_an_answer_ends_at_each_end_that_an_import_declares(tmp_path, forescale):
    """As with HFLM; the second of two, which is likely here."""
    from lm_eval.api.instance import Instance

    original = model_of("Qwen2")  # without tied embeddings
    original.lm_head.weight.data[257] *= 3
    original.generation_config.eos_token_id = [256, 257]
    folder = write(original, tmp_path / "llama")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|turn|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert forescale("import", "hf", folder, "it", f"run.root={tmp_path}")[0] == 0
    model, hflm = open_run(tmp_path / "it").language_model(), hflm_of(folder)
    texts = (f"a{c}" for c in "bcdefgh")
    how = {"max_gen_toks": 12, "until": []}
    requests = [Instance("generate_until", {}, (text, how), i) for i, text in enumerate(texts)]
    answers = model.generate_until(requests)
    assert answers == hflm.generate_until(requests)
    assert min(map(len, answers)) < 6


def rows_of_forwards(model, monkeypatch) -> list[int]:
    """The rows of each forward pass from now on."""
    rows: list[int] = []
    forward = model._model.forward

    def counted(tokens, **options):
        rows.append(len(tokens))
        return forward(tokens, **options)

    monkeypatch.setattr(model._model, "forward", counted)
    return rows


def test_what_the_model_reads_alike_is_read_once(trained, monkeypatch):
    """Choices of one token cost one row, and are as likely as each alone."""
    model = open_run(trained.path).language_model()
    rows = rows_of_forwards(model, monkeypatch)
    requests = [(("", ""), [5, 6, 7], [token]) for token in (1, 2, 3)]
    together = model._loglikelihood_tokens(requests)
    assert rows == [1]
    alone = [model._loglikelihood_tokens([one])[0] for one in requests]
    assert together == alone
    assert len({nats for nats, _ in together}) == 3


def test_a_model_that_continues_no_text_is_refused(small_data, tmp_path):
    words = [*SIZES, "objective=masked", "model.causal=false"]
    run = make_run(small_data, tmp_path / "runs", "masked", *words)
    with pytest.raises(
        UserError, match=r"^tasks: was trained with objective=masked, and continues no"
    ):
        open_run(run.path).language_model()


def test_an_answer_is_drawn_where_its_task_says_so(trained):
    model, greedy = open_run(trained.path).language_model(), {"max_gen_toks": 12, "until": []}

    def answer(**how):
        from lm_eval.api.instance import Instance

        requests = ("generate_until", {}, ("def main(", greedy | how), 0)
        return model.generate_until([Instance(*requests)])

    drawn = answer(do_sample=True, temperature=1.0)
    assert drawn == answer(temperature=1.0) != answer()
    assert answer(do_sample=False, temperature=1.0) == answer()
    with pytest.raises(UserError, match=r"do_sample is true, without a temperature above 0"):
        answer(do_sample=True)


def test_answers_of_different_rules_are_written_at_once_as_each_alone(trained, monkeypatch):
    from lm_eval.api.instance import Instance

    model = open_run(trained.path).language_model(batch=3)
    rules = [{}, {"repetition_penalty": 1.5}, {"max_gen_toks": 2}]
    requests = [
        Instance(
            "generate_until", {}, (f"def {'m' * i}(", {"max_gen_toks": 9, "until": []} | how), 0
        )
        for i, how in enumerate(rules)
    ]
    alone = [model.generate_until([one])[0] for one in requests]
    rows = rows_of_forwards(model, monkeypatch)
    assert model.generate_until(requests) == alone
    assert len(set(alone)) == 3
    assert rows == [3] * 2 + [2] * 7
