"""``python -m quantkit`` is the command line."""

from __future__ import annotations

from quantkit.cli import main

if __name__ == "__main__":
    main()
