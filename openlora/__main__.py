"""``python -m openlora``: the same as the ``openlora`` command."""

import sys

from openlora.cli import main

sys.exit(main())
