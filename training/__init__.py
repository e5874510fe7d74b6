"""How the shipped reference model was made: tokenizer, data, curriculum, training, evaluation.

Not part of the wheel. Takes the generated tasks from ``tuner.data.generated``.
"""
