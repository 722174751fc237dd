"""`python -m forgetlearn`."""

from forgetlearn.cli import run

if __name__ == "__main__":
    run()
