"""The search for a setting: its space, the measurements, the stages."""
