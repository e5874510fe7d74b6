"""What serves the calls: the loaded model with its engine thread, and the alpha tables."""
