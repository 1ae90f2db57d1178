"""Weight files as others write them: found, read without running code, loaded whole or not at all."""
