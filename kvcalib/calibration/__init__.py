"""The calibration file: mergeable sums and a token sample, and the pass over a model that fills it."""
