"""Side-by-side measurements. Results stand in `results/` with machine, versions and date."""
