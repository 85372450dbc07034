"""What ``python -m fastadam demo`` runs: ``digits``, ``embedding``, and ``show`` for their bars and pictures."""
