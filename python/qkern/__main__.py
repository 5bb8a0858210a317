"""``python -m qkern``: the command line."""

from qkern.cli import main

raise SystemExit(main())
