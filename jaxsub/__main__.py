"""`python -m jaxsub PROGRAM`."""

from jaxsub import cli

if __name__ == "__main__":
    cli.entry()
