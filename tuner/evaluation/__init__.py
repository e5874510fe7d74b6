"""What a policy costs on examples, and whether one is better than another."""
