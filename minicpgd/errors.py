"""The one exception a user is meant to read.

Whatever the user can put right (a field, a file, a reward function, a full disk) raises `UserError` with one line that
says what was wrong, where, and what would be right. The command line prints that line and exits with code 2; Python
callers can catch it. Anything else that escapes is a bug of ours and keeps its traceback.
"""


class UserError(Exception):
    """What was wrong, where (file, line, field), and what would be right, in one line."""


class ConfigError(UserError):
    """A setting, or a combination of settings, that cannot be run."""


class NonFiniteError(UserError):
    """A loss or a gradient stopped being a number; the policy was left as it was before that update."""
