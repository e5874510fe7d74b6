"""How the shipped reference model was made: tokenizer, data, curriculum, training, evaluation.

Not part of the wheel. Imports ``tuner.generated`` for the generated tasks; nothing imports this.
"""
