"""The program: `minicpgd`, or `python -m minicpgd`.

Importing torch takes seconds, and nothing can be lost then. So Ctrl-C ends the process at once and silently during the
imports, and again after the command.
"""

import signal


def main() -> None:
    """Entry point of `minicpgd`."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from minicpgd.cli import main as cli

    try:
        cli.main()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()
