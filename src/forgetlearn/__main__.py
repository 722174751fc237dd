"""`python -m forgetlearn`."""

from forgetlearn.cli.main import run

if __name__ == "__main__":
    run()
