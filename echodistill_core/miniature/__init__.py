"""The embedded family `miniature`: a synthetic image domain with known ground truth, and models trained on it."""
