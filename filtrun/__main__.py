"""``python -m filtrun`` is the same as the command ``filtrun``."""

import sys

from filtrun.cli import main

sys.exit(main())
