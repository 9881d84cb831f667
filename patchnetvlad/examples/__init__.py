"""Places that are drawn and rendered with known geometry: the example pictures and a small MSLS."""
