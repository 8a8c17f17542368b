"""Images to scores: sources of images, features of them, the suites `study` and `adm`, and the card of each score.

Scores of a run's checkpoints are in `haste_core.study.evaluation`.
"""
