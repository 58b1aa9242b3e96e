"""``python -m hfq.integrations.cli`` is ``hfq``."""

from hfq.integrations.cli import main

main()
