"""avrl: from egocentric video to a trustworthy action-probing table.

`import avrl` needs neither Typer nor torch; each hop of the data is one module (see README.md).
"""

__version__ = "0.1.0"
