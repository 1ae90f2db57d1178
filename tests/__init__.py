"""A package by name: without this file, any installed package called `tests` would be imported in its place."""
