"""`python -m qtdog`, which is also what `accelerate launch -m qtdog` starts."""

from qtdog.cli.main import main

main()
