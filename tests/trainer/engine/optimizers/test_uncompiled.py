"""Optimizers that import no compiler update as torch's own do."""

import json
import subprocess
import sys

_UPDATES = """
import torch
from forescale.config.sections.optimizer import AdamWConfig
from forescale.engine.optimizers import adamw, lion

found = []
for made in (adamw, lion):
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    optimizer = made.build(AdamWConfig(), [{"params": [weight], "lr": 0.25}])
    for step in range(3):
        (weight * torch.tensor([1.0, -2.0, 0.5])).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())
        found.append([weight.requires_grad, weight.grad is None, weight.tolist()])
"""
_PROCESS = f"""
import json, sys
from forescale.engine.optimizers.uncompiled import without_compiler

without_compiler()
{_UPDATES}
print(json.dumps([found, "torch._dynamo" in sys.modules]))
"""


def test_they_update_to_the_bit_as_torchs_own_and_import_no_compiler(tmp_path):
    command = [sys.executable, "-P", "-c", _PROCESS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    torchs: dict = {}
    exec(_UPDATES, torchs)
    assert json.loads(done.stdout) == [torchs["found"], False]
