"""One command per file, which ``gapo_mega/cli.py`` registers.

What commands share: ``options``, ``launch`` (processes), ``supervised`` (of ``sft`` and ``train-reward``) and
``reward_server`` (what ``serve-reward`` serves).
"""
