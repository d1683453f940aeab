"""Random kills: runs are disturbed by signals at chosen places, resumed, and compared with undisturbed ones.

``python -m tests.helpers.kills --help``; ``make survive``.
"""
