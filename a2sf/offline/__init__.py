"""Predictions along given texts under a policy, for the tuner and for evaluation."""
