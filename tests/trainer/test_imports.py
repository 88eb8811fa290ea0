"""What a process imports."""

import subprocess
import sys

_PROCESS = """
import gc, sys
import forescale.verbs.train, forescale.cli
from forescale.verbs.train import first_imports

assert "torch" not in sys.modules  # the launcher only starts ranks
with first_imports():
    assert not gc.isenabled()
    import forescale.inference.summary, forescale.inference.scoring, forescale.engine.build
    import forescale.verbs.serve, forescale.verbs.export
assert gc.isenabled() and gc.get_freeze_count() > 100_000
frozen = gc.get_freeze_count()
with first_imports():
    assert gc.isenabled()  # torch is there: nothing to gain
assert gc.get_freeze_count() == frozen
print([name for name in ("torch._dynamo", "deepspeed") if name in sys.modules])
"""


def test_no_process_imports_what_it_may_never_need(tmp_path):
    """torch's compiler is a second of each process, and only ranks need it."""
    command = [sys.executable, "-P", "-c", _PROCESS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
