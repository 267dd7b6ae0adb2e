"""ernietune: fine-tuning, export and serving of ERNIE-4.5 models on PaddlePaddle."""

from ernietune import environment

__version__ = "0.1.0"

environment.prepare()
