"""`python -m harmconvert`, for torchrun and for environments without scripts."""

from .cli import main

if __name__ == "__main__":
    main()
