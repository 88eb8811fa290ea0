"""How often a rank waits for its device in a step, counted where there is none: reads of a tensor's
value, copies to the host and calls to synchronize, on two real ranks."""

import pytest

from tests.distributed import ranks

pytestmark = pytest.mark.distributed

# The step's loss and norm, on which the guard decides before the update; the summary of the step
# before, which a GPU has copied to the host by then (World._late_read).
EXPECTED = {"tolist in step.py:measure": 1, "tolist in world.py:read": 1}
# At stage 3 DeepSpeed looks whether its own norm is a number.
STAGE_3 = {"utils.py:is_invalid_grad_norm": 1}


def test_a_step_waits_once_and_at_stage_3_twice():
    cases = [[stage, kind, "bf16"] for stage in (1, 2, 3) for kind in ("adamw", "muon")]
    results = ranks.run("wait_scenarios:waits", 2, 280, cases=cases)
    for case, counted in zip(cases, results, strict=True):
        assert counted == (EXPECTED | STAGE_3 if case[0] == 3 else EXPECTED), case
