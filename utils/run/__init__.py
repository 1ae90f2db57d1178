"""What surrounds a run: config, registries, folders, errors."""
