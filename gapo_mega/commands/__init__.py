"""One command a file; ``cli.py`` assembles them."""
