"""`python -m forescale` is `forescale`.

Without -P Python puts the working directory before everything else, where a file of the user's
named random.py would replace Python's own. It is taken out before anything more is imported.
"""

import sys

if not sys.flags.safe_path:
    del sys.path[0]

from forescale.cli import main

sys.exit(main())
