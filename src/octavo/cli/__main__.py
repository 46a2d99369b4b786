"""``python -m octavo.cli``."""

import sys

from octavo.cli.app import main

sys.exit(main())
