"""Small tasks of lm_eval, one of each kind of question, with their data in local files."""

import json
from pathlib import Path

CHOICE = """\
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{train: {data}, test: {data}}}}}
fewshot_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 3}}
"""
ANSWER = """\
task: answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{start}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
num_fewshot: 0
"""
ROLLING = """\
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
_CHOICES = [" x\n", " return 'naïve'\n", ":\n    print", "数据"]
_START = "def main(argument, other=None):\n    for name in range(argument)"


def make_tasks(folder: Path, rows: int = 6) -> dict[str, Path]:
    """The task files by kind, for windows of 32 tokens: some questions fit, some don't."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data.jsonl"
    lines = [
        {
            "start": _START[: 9 + 9 * i] + "  " * (i % 2),
            "choices": _CHOICES,
            "answer": i % 4,
            "target": "x",
            # No text repeats itself: HFLM's cache of logits confuses windows that are equal.
            "text": "".join(
                f"class Model{n}:\n    width = {n * n + i}\n" for n in range(1 + 2 * i)
            ),
        }
        for i in range(rows)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = {"choice": CHOICE, "answer": ANSWER, "rolling": ROLLING}
    files = {name: folder / f"{name}.yaml" for name in texts}
    for name, text in texts.items():
        files[name].write_text(text.format(data=data))
    return files
