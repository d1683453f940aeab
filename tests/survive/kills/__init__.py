"""Random kills: runs are disturbed by signals at chosen places, resumed, and compared with undisturbed ones.

``python -m tests.survive.kills --help``; ``make survive``.
"""
