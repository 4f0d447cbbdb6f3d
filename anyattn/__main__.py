"""`python -m anyattn` is the command `anyattn`."""

import sys

from anyattn.cli import main

sys.exit(main())
