"""The loss of a run as a picture in a notebook, drawn again while the run trains.

Invariant: outside of a notebook nothing is drawn or imported; in one, drawing takes at most a
tenth of the time.
"""

import sys
import time
from collections.abc import Mapping
from typing import Any

from forescale.ground.errors import UserError
from forescale.run.directory import Run

_EVERY = 5.0  # seconds between two pictures, at least
_SHARE = 0.1  # of the time, for drawing


class LiveLoss:
    """Takes the objects that `train --json` prints, and displays the loss of their run."""

    def __init__(self) -> None:
        self._run: Run | None = None
        self._handle: Any = None
        self._next = 0.0  # time.monotonic

    def __call__(self, facts: Mapping[str, Any]) -> None:
        """Draw the loss, if it is time to; at the end always."""
        if not in_notebook():
            return
        if facts.get("kind") == "started":
            self._run = Run(facts["path"])
        now, kind = time.monotonic(), facts.get("kind")
        is_due = kind == "ended" or (kind in ("train", "validation") and now >= self._next)
        if self._run is not None and is_due:
            try:
                self._draw(self._run)
            except UserError:  # no step yet
                pass
            except Exception as e:  # no picture is worth the run
                print(f"The loss is not drawn any more ({type(e).__name__}: {e}).")
                self._run = None
            self._next = time.monotonic() + max(_EVERY, (time.monotonic() - now) / _SHARE)

    def _draw(self, run: Run) -> None:
        from IPython.display import display

        from forescale.monitor.report.loss_picture import picture  # imports matplotlib

        image = {"image/svg+xml": picture([run], "step", "svg").decode()}
        if self._handle is None:
            self._handle = display(image, raw=True, display_id=True)
        else:
            self._handle.update(image, raw=True)


def in_notebook() -> bool:
    """Return True if this process is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")
