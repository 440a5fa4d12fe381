"""``python -m mmsearch.cli``."""

from .app import main

main()
