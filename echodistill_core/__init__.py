"""EchoDistill: personalise a one-step text-to-image model from a few photographs.

The method's nouns are the modules: concept, models, diffusion, perception, losses, training, adapter, sampling.
"""

__version__ = "0.1.0"
