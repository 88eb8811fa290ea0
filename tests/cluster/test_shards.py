"""A dataset that nodes of SLURM build together: the bytes of one process, after a lost node too."""

import json
import sys
from pathlib import Path

from tests.cluster.lab import Lab

WORDS = ["vocab_size=400", "shard_tokens=200000", "member_tokens=50000", "workers=1"]


def test_two_nodes_build_what_one_process_builds_though_one_is_lost(lab: Lab, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    lines = (f"Line {i} of a long text, about number {i * i}.\n" for i in range(250_000))
    texts = ("".join(group) for group in zip(*[lines] * 50, strict=True))
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def forescale(verb: str, name: str, *keys: str) -> str:
        words = [*verb.split(), str(rows), f"output={tmp_path / name}", *WORDS, *keys]
        command = [sys.executable, "-P", "-m", "forescale", *words, "curate.steps=[repair]"]
        return lab.run(*command, cwd=tmp_path, env={"OMP_NUM_THREADS": "1"}, seconds=300)

    output = forescale(
        "submit shards", "both", "slurm.nodes=2", "slurm.exclusive=true",
        f"slurm.scratch={lab.scratch}",
    )  # fmt: skip
    job = output.partition("Submitted job ")[2].partition(":")[0] + "_0"
    finished = tmp_path / ".both.building/curated"
    lab.wait(lambda: [*finished.glob("0*")], 120)
    _, node = lab.run("scontrol", "show", "hostnames", lab.show(job)["NodeList"]).split()
    lab.power_off(node)
    before = len([*finished.glob("0*")])
    lab.wait(lambda: lab.show(job)["Restarts"] == "1", 120)
    lab.wait(lambda: lab.state(job) == "COMPLETED", 300)
    assert 0 < before < 64, "the node was lost while the build was under way"
    forescale("shards", "alone")
    alone, both = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("alone", "both")
    )
    assert alone == both
    lab.power_on(node)
