"""`python -m scalablevit_pl`."""

import sys

from scalablevit_pl.commands.main import main

sys.exit(main())
