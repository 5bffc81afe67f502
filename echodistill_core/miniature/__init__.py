"""The embedded family: a small world whose every picture is understood, and the models that were trained on it."""
