"""`python -m forescale` is the command `forescale`.

Without -P, Python searches the working directory before everything else, so a file such as
random.py there would replace Python's own. Its entry is removed before anything more is imported.
"""

import sys

if not sys.flags.safe_path:
    del sys.path[0]

from forescale.cli import main

sys.exit(main())
