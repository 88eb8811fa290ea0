"""The task that is made from held-out text: its right lines are those of the text."""

from tests.benchmarks.next_line import questions


def test_each_question_has_its_line_and_three_that_follow_other_heads():
    bodies = ["return a", "x = 1", "pass", "for b in a:", "raise KeyError"]
    text = "".join(f"def f{i}(a):\n    {body}\n\n" for i, body in enumerate(bodies))
    text += 'class C:\n    def deep(self):\n        return 9\n\ndef g():\n    """A text."""\n'
    rows = questions(iter([text]), 9)
    assert rows == questions(iter([text]), 9)
    assert len(rows) == 5  # neither of the only one so deep, nor of the text
    for one in rows:
        assert one["start"].endswith("(a):\n")
        assert one["start"] + one["lines"][one["right"]] in text
        assert len(set(one["lines"])) == 4
        assert {line.strip() for line in one["lines"]} <= {*bodies}
