"""`python -m godwit`: the command line."""

from __future__ import annotations

import sys

from godwit.cli.main import main

sys.exit(main())
