"""`python -m anyattn` is the command `anyattn`."""

from __future__ import annotations

import sys

from anyattn.cli import main

sys.exit(main())
