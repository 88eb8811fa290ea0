"""Mixtures, damage and document masks through the main command, on real ranks."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from forescale.data.dataset import Dataset
from forescale.data.prepare.builder import BuildConfig, build_dataset
from forescale.data.text.files import Files
from tests import launching

pytestmark = pytest.mark.distributed

LENGTH = ("train.tokens=null", "train.steps=30", "checkpoint.every=10", "validation.every=30")
STEP_TARGETS = 8 * 32


@pytest.fixture
def sources(tmp_path) -> dict[str, Path]:
    """Two datasets of one tokenizer, of several shards each."""
    datasets = {}
    for name in ("prose", "code"):
        folder = tmp_path / "text" / name
        folder.mkdir(parents=True)
        for i in range(60):
            words = " ".join(f"{name}{(i * j) % 97}" for j in range(120))
            (folder / f"{i:02}.txt").write_text(f"{name} number {i}: {words}\n")
        config = BuildConfig(
            tokenizer="bytes", validation=0.1, shard_tokens=8192, member_tokens=1024
        )
        datasets[name] = build_dataset(Files([folder]), tmp_path / name, config)
    return datasets


def mixture(sources: dict[str, Path]) -> tuple[str, ...]:
    paths = ", ".join(f"{name}: {path}" for name, path in sources.items())
    return (
        "data=mixture",
        f"data.sources={{{paths}}}",
        "data.weights={prose: 3, code: 1}",
        "data.stages=[{from: 15 steps, weights: {prose: 1, code: 3}}]",
    )


def check(run: Path) -> str:
    """`forescale check RUN`, which must find nothing."""
    command = [sys.executable, "-P", "-m", "forescale", "check", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=launching.ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def flip(path: Path, member: int) -> None:
    """Change a byte in the tokens of a member of the shard at `path`."""
    index = json.loads(path.with_name(path.name.replace(".tar", ".index.json")).read_text())
    with open(path, "r+b") as f:
        f.seek(index["members"][member]["tok"]["offset"] + 100)
        byte = f.read(1)
        f.seek(-1, 1)
        f.write(bytes([byte[0] ^ 1]))


def test_a_mixture_in_stages_resumes_at_another_world_size_with_the_same_tokens(sources, tmp_path):
    command = (*mixture(sources), *LENGTH, "data.document_mask=true")
    launching.train(tmp_path, "run.name=still", *command, "launch.processes=1")
    process = launching.start(tmp_path, "run.name=moving", *command, "launch.processes=2")
    launching.interrupt(process, tmp_path / "moving", 12, signal.SIGKILL)
    four = ("launch.processes=4", "data.workers=3")
    launching.train(tmp_path, "run.name=moving", *command, *four, cold=True)
    still, moving = (launching.rows(tmp_path / name) for name in ("still", "moving"))
    assert [r["tokens_hash"] for r in moving] == [r["tokens_hash"] for r in still]
    assert [r["shares"] for r in moving] == [r["shares"] for r in still]
    before, after = (
        {name: sum(row["shares"][name] for row in rows) for name in sources}
        for rows in (still[:15], still[15:])
    )
    # Exact to within a window in each stage, but for the short windows at the ends of shards.
    for counts, share in ((before, 0.75), (after, 0.25)):
        total = sum(counts.values())
        assert total <= 15 * STEP_TARGETS
        assert counts["prose"] == pytest.approx(share * total, abs=4 * 32)
    assert moving[-1]["loss"] == pytest.approx(still[-1]["loss"], rel=0.02)
    datasets = [r["dataset"] for r in launching.rows(tmp_path / "still", "validation")]
    assert datasets[-3:] == ["prose", "code", "validation"]
    assert "each step's tokens are those in the shards" in check(tmp_path / "moving")


def test_damage_is_reported_and_never_trained_on(sources, tmp_path):
    command = (f"data.path={sources['prose']}", *LENGTH, "launch.processes=2")
    shard = sources["prose"] / "train-000001.tar"
    for member in range(4):
        flip(shard, member)
    output = launching.train(tmp_path, "run.name=fails", *command, code=2)
    assert "train-000001.tar: member 00000" in output
    assert "Traceback" not in output


def test_all_ranks_use_the_same_substitutes_also_after_a_kill(sources, tmp_path):
    """Ranks find damage at different times; all continue with the same windows, at any world
    size."""
    command = (f"data.path={sources['prose']}", *LENGTH, "data.damaged=substitute")
    flip(sources["prose"] / "train-000000.tar", 2)
    flip(sources["prose"] / "train-000002.tar", 5)
    launching.train(tmp_path, "run.name=still", *command, "launch.processes=1")
    process = launching.start(tmp_path, "run.name=moving", *command, "launch.processes=2")
    launching.interrupt(process, tmp_path / "moving", 14, signal.SIGKILL)
    launching.train(tmp_path, "run.name=moving", *command, "launch.processes=2")
    for name in ("still", "moving"):
        run = tmp_path / name
        lost = {tuple(m) for row in launching.rows(run) for m in row.get("quarantined", ())}
        assert lost == {("data", 0, "000002"), ("data", 2, "000005")}
        assert "member_quarantined" in launching.events(run)
        newest = max((run / "checkpoints").iterdir())
        state = json.loads((newest / "state.json").read_text())
        assert {tuple(m) for m in state["position"]["quarantined"]} == lost
        assert "each step's tokens are those in the shards" in check(run)
    still, moving = (launching.rows(tmp_path / name) for name in ("still", "moving"))
    assert [r["tokens"] for r in moving] == [r["tokens"] for r in still]
    hashes = [[r["tokens_hash"] for r in rows] for rows in (still, moving)]
    assert hashes[0] == hashes[1]
    assert Dataset(sources["prose"]).split("train").num_tokens > 0
