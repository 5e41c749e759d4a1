"""`python -m tvl_align` is `tvl-align`."""

from tvl_align.cli.main import main

if __name__ == "__main__":
    main()
