"""The command line: `minicpgd COMMAND`.

In: what the user typed. Out: text, figures and folders; one line and exit code 2 for a mistake that the user can
correct. Every command is a function: its arguments are its flags, its docstring is its help. A command imports what it
needs when it runs, so that `--help` answers at once. `main.py` reads the words and calls the command.
"""
