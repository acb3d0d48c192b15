"""`python -m ipmerge_core` is the `ipmerge` command."""

import sys

from ipmerge_core.cli import main

sys.exit(main())
