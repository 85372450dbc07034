"""The demos of ``python -m fastadam demo``: ``digits`` and ``embedding``; ``show`` draws their bars and pictures."""
