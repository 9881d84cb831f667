"""Array files: how descriptors are stored in them, a file for each picture and patch size or blocks of pictures."""
