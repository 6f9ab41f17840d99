"""``python -m batchnorm``: the command line."""

from batchnorm.cli import main

if __name__ == "__main__":
    main()
