"""The command line: the only package that knows Typer. Verbs here, nouns in the cache."""
