"""A dataset that nodes of SLURM build together: the bytes of one process, after lost nodes too."""

import json
from pathlib import Path

from tests.cluster.lab import Lab

WORDS = ["vocab_size=400", "validation_fraction=0.1", "shard_tokens=20000", "member_tokens=5000"]


def test_two_nodes_build_what_one_process_builds_though_one_is_lost(
    lab: Lab, forescale: Path, tmp_path: Path
):
    rows = tmp_path / "rows.jsonl"
    texts = (f"document {i} of many, with words {i * i} " * (1 + i % 40) for i in range(3000))
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = [str(rows), *WORDS, "curate=text", "workers=1"]
    lab.run(forescale, "shards", *words, f"output={tmp_path / 'alone'}", cwd=tmp_path)
    said = lab.run(
        forescale, "submit", "shards", *words, f"output={tmp_path / 'both'}", "slurm.nodes=2",
        "slurm.exclusive=true", cwd=tmp_path,
    )  # fmt: skip
    job = said.partition("Submitted job ")[2].partition(":")[0]
    lab.wait(lambda: [*tmp_path.glob(".both.building/curated/0*")])
    node = lab.show(f"{job}_0")["NodeList"].rpartition(",")[2]
    lab.wait(lambda: lab.state(f"{job}_0") == "COMPLETED", 300)
    alone, both = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("alone", "both")
    )
    assert alone == both, node
