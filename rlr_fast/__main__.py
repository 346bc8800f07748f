"""``python -m rlr_fast`` is the ``rlr-fast`` command (for torchrun)."""

from __future__ import annotations

import sys

from rlr_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
