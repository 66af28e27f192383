"""`python -m scalablevit_pl`."""

import sys

from scalablevit_pl.cli import main

sys.exit(main())
