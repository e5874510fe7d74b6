"""Results for people: the terminal, and HTML pages with pictures."""
