"""The program `qtdog`: what the command, `python -m qtdog` and `accelerate launch -m qtdog` start."""

from __future__ import annotations

import signal


def main() -> None:
    """Load the program and run it; Ctrl-C while it loads ends it at once, without a trace of what it was loading."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # a program that ignores Ctrl-C, such as nohup, still does
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from qtdog.cli.main import main as run

    signal.signal(signal.SIGINT, handler)
    run()


if __name__ == "__main__":
    main()
