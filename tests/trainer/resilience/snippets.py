"""What the tests of the launcher share: the start of a rank's snippet, and what a launch left."""

from forescale.ground.storage import read_json
from forescale.resilience.outcome import LAUNCH

LISTEN = "from forescale.resilience.launcher import unblock_stop_signals as f\nf()\n"


def launched(attempt):
    """What launch.json says of an attempt."""
    return read_json(attempt / LAUNCH)
