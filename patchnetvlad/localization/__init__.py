"""Places in the world: coordinates, camera poses, and the positions of queries from their matches."""
