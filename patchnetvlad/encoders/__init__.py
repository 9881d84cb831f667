"""Encoders, a file each: pictures to feature maps; and the table of their names."""
