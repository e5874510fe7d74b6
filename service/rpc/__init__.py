"""Everything that a call passes on its way to the engine and back."""
