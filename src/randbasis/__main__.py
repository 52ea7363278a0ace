"""``python -m randbasis`` is the command ``randbasis``."""

from randbasis.cli import main

if __name__ == "__main__":
    main()
