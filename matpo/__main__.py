"""`python -m matpo` is the `matpo` command."""

from matpo.cli.main import main

if __name__ == "__main__":
    main()
