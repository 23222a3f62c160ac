"""`python -m litgpt`."""

import sys

from litgpt.cli import main

sys.exit(main())
