"""`python -m megamug train CONFIG.yaml`: one process. `torchrun --nproc-per-node N -m megamug train ...`: N of them."""

from megamug.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
